"use strict";
// From the view to pixels. Lengths are CSS pixels; a canvas has `devicePixelRatio` times as many.

const GUTTER = 92; // names of groups and amino acids
const TRACK = 34;
const TRACK_GAP = 8;
const LETTERS = 16;
const NUMBERS = 20;
const FONT = '"DejaVu Sans", system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

const stops = data.colours.map((text) => [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16)));

/** [red, green, blue] of a score: as matplotlib blends, evenly between the stops. */
function colourOf(score) {
  const place = Math.min(1, Math.max(0, (score / data.limit + 1) / 2)) * (stops.length - 1);
  const below = Math.min(stops.length - 2, Math.floor(place));
  return stops[below].map((from, channel) => Math.round(from + (stops[below + 1][channel] - from) * (place - below)));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;

function theme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["paper", "panel", "ink", "soft", "line", "unknown", "accent", "entropy", "veil"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function rgbOf(text) {
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

/** Sizes of the map for a width of paper. */
function geometry(width) {
  const row = Math.max(13, Math.min(22, (window.innerHeight - 435) / 20));
  const tracks = (TRACK + TRACK_GAP) * (entropies ? 2 : 1);
  return { width, row, tracks, left: GUTTER, plot: Math.max(40, width - GUTTER - 8), height: tracks + 20 * row + LETTERS + NUMBERS };
}

const xOf = (shape, column) => shape.left + ((column - view.from) / view.span) * shape.plot;
const yOf = (shape, row) => shape.tracks + row * shape.row;

/** One pixel a cell, in the present order: drawing is one stretch of it, however long the protein. */
const cells = document.createElement("canvas");
let cellsAreOf = "";
function paintCells(colours) {
  const key = [view.positionOrder, view.acidOrder, colours.unknown].join();
  if (key === cellsAreOf) return;
  cellsAreOf = key;
  cells.width = LENGTH;
  cells.height = 20;
  const context = cells.getContext("2d");
  const image = context.createImageData(LENGTH, 20);
  const unknown = rgbOf(colours.unknown);
  view.rows.forEach((acid, row) => {
    view.columns.forEach((site, column) => {
      const score = acid === own[site] ? 0 : data.scores[site][acid];
      image.data.set([...(known(score) ? colourOf(score) : unknown), 255], 4 * (row * LENGTH + column));
    });
  });
  context.putImageData(image, 0, 0);
}

const lowestMean = Math.min(0, ...siteMeans.filter(known));
const highestMean = Math.max(0, ...siteMeans.filter(known));
const ends = lowestMean < highestMean ? [lowestMean, highestMean] : [-1, 1];

const snap = (length) => Math.round(length * (window.devicePixelRatio || 1)) / (window.devicePixelRatio || 1);

/** Entropy or mean score of columns [from, from + span) as bars; columns that share a pixel are averaged. */
function drawTrack(context, colours, box, values, [low, high], colour, from, span) {
  const yAt = (value) => box.y + box.height * (1 - (value - low) / (high - low));
  const bars = Math.min(Math.round(box.width), Math.ceil(span) + 1);
  const step = bars < span ? span / bars : 1;
  const start = step === 1 ? Math.floor(from) : from;
  context.save();
  context.beginPath();
  context.rect(box.x, box.y - 1, box.width, box.height + 2);
  context.clip();
  for (let left = start; left < from + span; left += step) {
    const among = view.columns.slice(Math.floor(left), Math.max(Math.floor(left) + 1, Math.floor(left + step)));
    const value = meanOf(among.map((site) => values[site]));
    if (!known(value)) continue;
    // From pixel to pixel: blurred edges would draw a line between any two bars.
    const [x, end] = [left, left + step].map((place) => snap(box.x + ((place - from) / span) * box.width));
    context.fillStyle = colour || css(colourOf(value));
    context.fillRect(x, Math.min(yAt(value), yAt(0)), end - x, Math.abs(yAt(value) - yAt(0)));
  }
  context.restore();
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(box.x, yAt(0));
  context.lineTo(box.x + box.width, yAt(0));
  context.stroke();
}

function drawTracks(context, colours, box, from, span) {
  const each = box.height / (entropies ? 2 : 1) - TRACK_GAP;
  let y = box.y;
  if (entropies) {
    const place = { ...box, y, height: each };
    drawTrack(context, colours, place, entropies, [0, Math.log(20)], colours.entropy, from, span);
    y += each + TRACK_GAP;
  }
  drawTrack(context, colours, { ...box, y, height: each }, siteMeans, ends, null, from, span);
}

function write(context, text, x, y, { size = 11, align = "center", colour, weight = "" }) {
  context.font = `${weight} ${size}px ${FONT}`;
  context.textAlign = align;
  context.textBaseline = "middle";
  context.fillStyle = colour;
  context.fillText(text, x, y);
}

function drawGutter(context, colours, shape) {
  const name = (text, y) => write(context, text, shape.left - 34, y, { align: "right", colour: colours.soft, size: 10.5 });
  const tick = (value, y) => write(context, shown(value), shape.left - 4, y, { align: "right", colour: colours.soft, size: 9 });
  let y = 0;
  if (entropies) {
    name("entropy", TRACK / 2);
    tick(3, 5);
    tick(0, TRACK - 3);
    y = TRACK + TRACK_GAP;
  }
  name("mean", y + TRACK / 2);
  const far = Math.max(ends[1], -ends[0]) === ends[1] ? ends[1] : ends[0];
  const atZero = y + (TRACK * ends[1]) / (ends[1] - ends[0]);
  tick(0, Math.min(y + TRACK - 3, Math.max(y + 4, atZero)));
  tick(Number(far.toPrecision(2)), far > 0 ? y + 4 : y + TRACK - 3);
  name("residue", shape.height - NUMBERS / 2 + 2);
  view.rows.forEach((acid, row) => {
    const focus = [view.hovered, view.selected].some((cell) => cell && cell.acid === acid);
    const style = { colour: focus ? colours.accent : colours.ink, weight: focus ? "bold" : "", size: 12 };
    write(context, ACIDS[acid], shape.left - 12, yOf(shape, row + 0.5), style);
  });
  if (view.acidOrder !== "chemistry") return;
  let row = 0;
  for (const [group, letters] of data.groups) {
    name(group, yOf(shape, row + letters.length / 2));
    context.fillStyle = colours.soft;
    context.fillRect(shape.left - 25, yOf(shape, row) + 2, 1, letters.length * shape.row - 4);
    row += letters.length;
  }
}

/** Numbers below the columns: every so many residues in the protein's order, else as many as there is room for. */
function drawNumbers(context, colours, shape, first, last) {
  const width = shape.plot / view.span;
  const y = shape.tracks + 20 * shape.row;
  if (width >= 8) {
    for (let column = first; column < last; column++) {
      const x = xOf(shape, column + 0.5);
      if (x < shape.left + 3 || x > shape.left + shape.plot - 3) continue;
      write(context, data.wild_type[view.columns[column]], x, y + 9, { colour: colours.ink, size: Math.min(12, width) });
    }
  }
  const inOrder = view.positionOrder === "position";
  const digits = String(data.first + LENGTH - 1).length;
  const room = digits * 7 + 12;
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].find((each) => each * width >= room) || 20000;
  for (let column = first; column < last; column++) {
    const number = view.columns[column] + data.first;
    if ((inOrder ? number : column) % step) continue;
    const x = xOf(shape, column + 0.5);
    if (x < shape.left || x > shape.left + shape.plot) continue;
    context.fillStyle = colours.soft;
    context.fillRect(x - 0.5, y + LETTERS + 1, 1, 3);
    write(context, String(number), x, y + LETTERS + 12, { colour: colours.ink, size: 11 });
  }
}

/** Dots on the wild type, boxes around what the table named, lines between cells and groups. */
function drawMarks(context, colours, shape, first, last) {
  const width = shape.plot / view.span;
  context.fillStyle = colours.paper;
  if (width >= 6) {
    for (let column = first; column <= last; column++) context.fillRect(xOf(shape, column) - 0.5, shape.tracks, 1, 20 * shape.row);
    for (let row = 1; row < 20; row++) context.fillRect(shape.left, yOf(shape, row) - 0.5, shape.plot, 1);
  }
  if (view.acidOrder === "chemistry") {
    let row = 0;
    for (const [, letters] of data.groups.slice(0, -1)) {
      row += letters.length;
      context.fillRect(shape.left, yOf(shape, row) - 1.5, shape.plot, 3);
    }
  }
  const radius = Math.max(0.6, Math.min(3.5, width * 0.2));
  const boxed = width >= 5 && marksGiven;
  for (let column = first; column < last; column++) {
    const site = view.columns[column];
    const x = xOf(shape, column + 0.5);
    if (own[site] >= 0) {
      context.fillStyle = "#1f2124"; // on colours that are the same in the dark
      context.beginPath();
      context.arc(x, yOf(shape, view.rowOf[own[site]] + 0.5), radius, 0, 2 * Math.PI);
      context.fill();
    }
    if (!boxed) continue;
    for (const acid of acids) {
      if (!isGiven(site, acid) || !known(scoreOf(site, acid))) continue;
      const [left, top] = [xOf(shape, column) + 2, yOf(shape, view.rowOf[acid]) + 2];
      outline(context, left, top, width - 4, shape.row - 4, 1.5);
    }
  }
}
/** A dark frame in a light one: seen on every colour. */
function outline(context, x, y, width, height, thickness) {
  for (const [colour, outset] of [["#ffffff", thickness], ["#1f2124", 0]]) {
    context.strokeStyle = colour;
    context.lineWidth = thickness;
    context.strokeRect(x - outset, y - outset, width + 2 * outset, height + 2 * outset);
  }
}

function drawFocus(context, colours, shape, cell, thickness) {
  const width = Math.max(3, shape.plot / view.span);
  const x = xOf(shape, view.columnOf[cell.site] + 0.5) - width / 2;
  if (x + width < shape.left || x > shape.left + shape.plot) return;
  const y = yOf(shape, view.rowOf[cell.acid]);
  outline(context, x, y, width, shape.row, thickness);
  context.fillStyle = colours.accent;
  context.fillRect(x, shape.tracks + 20 * shape.row + 1, width, 2);
}

/** What of the map stays while the pointer moves: tracks, cells, marks, letters and numbers. */
function drawBase(context, shape, colours) {
  paintCells(colours);
  context.fillStyle = colours.paper;
  context.fillRect(0, 0, shape.width, shape.height);
  const first = Math.floor(view.from);
  const last = Math.min(LENGTH, Math.ceil(view.from + view.span));
  drawTracks(context, colours, { x: shape.left, y: 0, width: shape.plot, height: shape.tracks }, view.from, view.span);
  context.save();
  context.beginPath();
  context.rect(shape.left, shape.tracks, shape.plot, 20 * shape.row + 4);
  context.clip();
  context.imageSmoothingEnabled = shape.plot / view.span < 1;
  // Row by row: where many residues share a pixel they are blended, and amino acids must not be.
  for (let row = 0; row < 20; row++) {
    const target = [xOf(shape, first), yOf(shape, row), ((last - first) / view.span) * shape.plot, shape.row];
    context.drawImage(cells, first, row, last - first, 1, ...target);
  }
  drawMarks(context, colours, shape, first, last);
  context.restore();
  drawNumbers(context, colours, shape, first, last);
}

/** What changes with the pointer: the cells in focus, and the letters of their rows. */
function drawTop(context, shape, colours) {
  context.save();
  context.beginPath();
  context.rect(shape.left, shape.tracks, shape.plot, 20 * shape.row + 4);
  context.clip();
  if (view.selected) drawFocus(context, colours, shape, view.selected, view.pinned ? 2.5 : 1.5);
  if (view.hovered) drawFocus(context, colours, shape, view.hovered, 1.5);
  context.restore();
  drawGutter(context, colours, shape);
}

const overviewBox = (width, height) => ({ x: GUTTER, y: 3, width: Math.max(40, width - GUTTER - 8), height: height - 3 });

/** All residues. */
function drawOverview(context, width, height, colours) {
  context.fillStyle = colours.paper;
  context.fillRect(0, 0, width, height);
  drawTracks(context, colours, overviewBox(width, height), 0, LENGTH);
  write(context, "all", GUTTER - 34, height / 2 - 6, { align: "right", colour: colours.soft, size: 10.5 });
  write(context, "residues", GUTTER - 34, height / 2 + 6, { align: "right", colour: colours.soft, size: 10.5 });
}

/** The window that the map shows of them. */
function drawWindow(context, width, height, colours) {
  const box = overviewBox(width, height);
  const left = box.x + (view.from / LENGTH) * box.width;
  const right = box.x + ((view.from + view.span) / LENGTH) * box.width;
  context.fillStyle = colours.veil;
  context.fillRect(box.x, 0, left - box.x, height);
  context.fillRect(right, 0, box.x + box.width - right, height);
  context.strokeStyle = colours.accent;
  context.lineWidth = 1.5;
  context.strokeRect(left, 1, Math.max(3, right - left), height - 2);
}

function drawScale(canvas, ticks) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.round(14 * ratio);
  drawScaleInto(canvas.getContext("2d"), 0, 0, canvas.width, canvas.height);
  const marks = [-data.limit, -data.limit / 2, 0, data.limit / 2, data.limit];
  ticks.replaceChildren(...marks.map((value, place) => {
    const mark = document.createElement("span");
    mark.textContent = (place === 0 ? "≤ " : place === 4 ? "≥ " : "") + shown(value);
    return mark;
  }));
}

function drawScaleInto(context, x, y, width, height) {
  for (let place = 0; place < width; place++) {
    context.fillStyle = css(colourOf((2 * place / (width - 1) - 1) * data.limit));
    context.fillRect(x + place, y, 1, height);
  }
}
