"use strict";
// Pointer, wheel, keys and buttons; and what tests may look at.

const byId = (id) => document.getElementById(id);
const map = byId("map");
const overview = byId("overview");
const tooltip = byId("tooltip");
let shape = geometry(map.clientWidth);

/** Draws at the next frame, once, whatever has changed by then. */
let asked = 0;
function redraw() {
  asked = asked || requestAnimationFrame(() => {
    asked = 0;
    drawAll();
  });
}

/** Makes a canvas of that many CSS pixels and returns its context, which draws in these. */
function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) {
    canvas.width = wide;
    canvas.height = high;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// What is slow to draw, with what it was drawn for: moving the pointer must not draw a thousand residues anew.
const layers = { base: document.createElement("canvas"), overview: document.createElement("canvas") };
const drawnFor = {};

function refresh(name, state, draw) {
  const key = JSON.stringify([state, window.devicePixelRatio]);
  if (drawnFor[name] === key) return;
  drawnFor[name] = key;
  draw();
}

/** Puts a layer onto a visible canvas of the same size. */
function put(layer, canvas, width, height) {
  canvas.style.height = `${height}px`;
  const context = fit(canvas, width, height);
  context.drawImage(layer, 0, 0, width, height);
  return context;
}

function drawAll() {
  const colours = theme();
  const width = map.clientWidth;
  shape = geometry(width);
  const orders = [view.positionOrder, view.acidOrder];
  refresh("base", [shape, colours, orders, view.from, view.span], () => {
    drawBase(fit(layers.base, width, shape.height), shape, colours);
  });
  drawTop(put(layers.base, map, width, shape.height), shape, colours);
  const high = entropies ? 62 : 34;
  refresh("overview", [width, colours, orders], () => {
    drawOverview(fit(layers.overview, width, high), width, high, colours);
  });
  drawWindow(put(layers.overview, overview, width, high), width, high, colours);
  const scale = byId("scale");
  refresh("scale", [scale.clientWidth], () => drawScale(scale, byId("scale-ticks")));
}

function tell(text) {
  byId("status").textContent = text;
}

function sentence(cell) {
  const [name, facts] = describe(cell);
  return `${name}: ${facts.map(([term, text]) => `${term} ${text}`).join(", ")}`;
}

function select(cell, pinned) {
  view.selected = cell;
  view.pinned = Boolean(cell && pinned);
  byId("pin").hidden = !view.pinned;
  tell(cell ? sentence(cell) : "");
  redraw();
}

/** The cell at a point of the window, or null. */
function cellAt(clientX, clientY) {
  const box = map.getBoundingClientRect();
  const column = Math.floor(view.from + ((clientX - box.left - shape.left) / shape.plot) * view.span);
  const row = Math.floor((clientY - box.top - shape.tracks) / shape.row);
  const inside = clientX - box.left >= shape.left && clientX - box.left < shape.left + shape.plot;
  return inside && column >= 0 && column < LENGTH && row >= 0 && row < 20
    ? { site: view.columns[column], acid: view.rows[row] }
    : null;
}

function hover(cell, x, y) {
  if (nameOf(cell) !== nameOf(view.hovered)) redraw();
  view.hovered = cell;
  tooltip.hidden = !cell;
  if (!cell) return;
  const [name, facts] = describe(cell);
  const head = document.createElement("b");
  head.textContent = name;
  const list = document.createElement("dl");
  for (const pair of facts) {
    pair.forEach((text, place) => {
      const item = document.createElement(place ? "dd" : "dt");
      item.textContent = text;
      list.append(item);
    });
  }
  tooltip.replaceChildren(head, list);
  const { width, height } = tooltip.getBoundingClientRect();
  // Beside the pointer, on the side where there is room.
  const left = x + 16 + width < window.innerWidth ? x + 16 : Math.max(4, x - 16 - width);
  const top = y + 16 + height < window.innerHeight ? y + 16 : Math.max(4, y - 16 - height);
  tooltip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

// One pointer drags, two pinch; a pointer that hardly moved has clicked.
const pointers = new Map();
let travelled = 0;

map.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  map.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  travelled = pointers.size > 1 ? Infinity : 0;
});

function columnAt(clientX) {
  return view.from + ((clientX - map.getBoundingClientRect().left - shape.left) / shape.plot) * view.span;
}

map.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) {
    hover(cellAt(event.clientX, event.clientY), event.clientX, event.clientY);
    return;
  }
  const other = [...pointers.values()].find((each) => each.pointerId !== event.pointerId);
  if (other) {
    const [was, is] = [before, event].map((each) => Math.max(20, Math.abs(each.clientX - other.clientX)));
    zoom(is / was, columnAt((event.clientX + other.clientX) / 2));
  } else {
    travelled += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
    if (travelled <= 4) return;
    show(view.from - ((event.clientX - before.clientX) / shape.plot) * view.span, view.span);
    map.classList.add("dragged");
  }
  pointers.set(event.pointerId, event);
  hover(null);
  redraw();
});

function release(event) {
  const pressed = pointers.delete(event.pointerId);
  map.classList.remove("dragged");
  if (!pressed || event.type === "pointercancel" || travelled > 4) return;
  const cell = cellAt(event.clientX, event.clientY);
  const again = view.pinned && nameOf(cell) === nameOf(view.selected);
  if (cell) select(again ? null : cell, true);
}
map.addEventListener("pointerup", release);
map.addEventListener("pointercancel", release);
map.addEventListener("pointerleave", () => hover(null));

map.addEventListener("wheel", (event) => {
  event.preventDefault();
  const pixels = event.deltaMode ? 32 : 1;
  const aside = event.shiftKey ? event.deltaY + event.deltaX : event.deltaX;
  if (Math.abs(aside) > Math.abs(event.deltaY) || event.shiftKey) {
    show(view.from + ((aside * pixels) / shape.plot) * view.span, view.span);
  } else {
    // Browsers report a pinch on a touchpad as small steps with Ctrl.
    zoom(Math.exp(-event.deltaY * pixels * (event.ctrlKey ? 0.01 : 0.0018)), columnAt(event.clientX));
  }
  hover(cellAt(event.clientX, event.clientY), event.clientX, event.clientY);
  redraw();
}, { passive: false });

function centre(event) {
  const share = (event.clientX - overview.getBoundingClientRect().left - shape.left) / shape.plot;
  show(share * LENGTH - view.span / 2, view.span);
  redraw();
}
overview.addEventListener("pointerdown", (event) => {
  overview.setPointerCapture(event.pointerId);
  centre(event);
});
overview.addEventListener("pointermove", (event) => event.buttons && centre(event));

function zoomBy(factor) {
  const seen = view.selected && view.columnOf[view.selected.site] + 0.5;
  const inView = seen && seen >= view.from && seen <= view.from + view.span;
  zoom(factor, inView ? seen : view.from + view.span / 2);
  redraw();
}
function showAll() {
  show(0, LENGTH);
  redraw();
}
byId("zoom-in").addEventListener("click", () => zoomBy(1.6));
byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.6));
byId("zoom-fit").addEventListener("click", showAll);

const page = () => Math.max(1, Math.floor(view.span) - 1);
const STEPS = {
  ArrowLeft: () => [-1, 0],
  ArrowRight: () => [1, 0],
  ArrowUp: () => [0, -1],
  ArrowDown: () => [0, 1],
  Home: () => [-LENGTH, 0],
  End: () => [LENGTH, 0],
  PageUp: () => [-page(), 0],
  PageDown: () => [page(), 0],
};
const ACTIONS = {
  "+": () => zoomBy(1.6),
  "=": () => zoomBy(1.6),
  "-": () => zoomBy(1 / 1.6),
  0: showAll,
  Enter: () => view.selected && select(view.selected, !view.pinned),
  " ": () => view.selected && select(view.selected, !view.pinned),
  Escape: () => select(null, false),
};

function step([right, down]) {
  if (!view.selected) {
    const column = Math.min(LENGTH - 1, Math.ceil(view.from));
    select({ site: view.columns[column], acid: view.rows[0] }, false);
    return;
  }
  const within = (place, count) => Math.min(count - 1, Math.max(0, place));
  const column = within(view.columnOf[view.selected.site] + right, LENGTH);
  const row = within(view.rowOf[view.selected.acid] + down, 20);
  reveal(column);
  select({ site: view.columns[column], acid: view.rows[row] }, false);
}

map.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in STEPS) step(STEPS[event.key]());
  else if (event.key in ACTIONS) ACTIONS[event.key]();
  else return;
  event.preventDefault();
});

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const cell = find(byId("query").value);
  byId("query").setAttribute("aria-invalid", String(typeof cell === "string"));
  if (typeof cell === "string") {
    select(null, false);
    tell(cell);
    return;
  }
  const column = view.columnOf[cell.site];
  // Near enough to see it, with its neighbours around it.
  const span = Math.min(view.span, Math.max(SHORTEST_SPAN, 60));
  show(column + 0.5 - span / 2, span);
  select(cell, true);
});

for (const [id, orders, sort] of [
  ["sort-positions", POSITION_ORDERS, sortPositions],
  ["sort-acids", ACID_ORDERS, sortAcids],
]) {
  for (const option of [...byId(id).options]) if (!(option.value in orders)) option.remove();
  // Some browsers keep a choice over a reload, and the page begins anew.
  byId(id).selectedIndex = 0;
  byId(id).addEventListener("change", (event) => {
    sort(event.target.value);
    if (id === "sort-positions") show(0, view.span);
    if (view.selected) reveal(view.columnOf[view.selected.site]);
    redraw();
  });
}

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${data.target.replace(/[^\w.-]+/g, "_").replace(/^\.+/, "").slice(0, 80) || "protein"}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

byId("save-csv").addEventListener("click", () => save(new Blob([table()], { type: "text/csv" }), "csv"));

byId("save-png").addEventListener("click", () => {
  const [colours, width, head, edge] = [theme(), map.clientWidth, 64, 16];
  const canvas = document.createElement("canvas");
  canvas.width = 2 * (width + 2 * edge);
  canvas.height = 2 * (head + shape.height + 2 * edge);
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.fillStyle = colours.paper;
  context.fillRect(0, 0, width + 2 * edge, head + shape.height + 2 * edge);
  context.translate(edge, edge);
  context.save();
  context.beginPath();
  context.rect(0, 0, width - 280, head);
  context.clip();
  write(context, data.target, 0, 10, { size: 16, weight: "bold", align: "left", colour: colours.ink });
  write(context, byId("about").textContent, 0, 31, { size: 11, align: "left", colour: colours.soft });
  context.restore();
  write(context, "score (higher: better tolerated)", width - 130, 6, { size: 11, colour: colours.ink });
  drawScaleInto(context, width - 250, 15, 240, 12);
  [-1, 0, 1].forEach((end) => {
    write(context, shown(end * data.limit), width - 130 + end * 110, 36, { size: 10, colour: colours.soft });
  });
  context.translate(0, head);
  drawBase(context, shape, colours);
  drawTop(context, shape, colours);
  canvas.toBlob((blob) => save(blob, "png"), "image/png");
});

document.title = `${data.target}: variant scores`;
byId("target").textContent = data.target;
byId("about").textContent =
  `${data.method}, ${data.model}; residues ${data.first} to ${data.first + LENGTH - 1}; ` +
  `${ranked.length.toLocaleString("en")} substitutions scored`;
byId("key-unknown").hidden = ranked.length === LENGTH * 20 - own.filter((acid) => acid >= 0).length;
byId("key-given").hidden = !marksGiven;
new ResizeObserver(redraw).observe(map);
window.addEventListener("resize", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
drawAll();

/**
 * For tests and scripts. `state` is a copy of what is shown: names of the two orders, the residues' numbers and the
 * amino acids in that order, the first column and the number of columns in view, and the cells' names or null.
 * `point("A24G")` is the middle of a cell in pixels of the window, or null where it is out of view.
 */
window.protnest = Object.freeze({
  get state() {
    return {
      positionOrder: view.positionOrder,
      acidOrder: view.acidOrder,
      positions: view.columns.map((site) => site + data.first),
      acids: view.rows.map((acid) => ACIDS[acid]).join(""),
      from: view.from,
      span: view.span,
      selected: nameOf(view.selected),
      hovered: nameOf(view.hovered),
      pinned: view.pinned,
    };
  },
  point(name) {
    const cell = find(name);
    const column = typeof cell === "string" ? -1 : view.columnOf[cell.site];
    if (column < view.from || column + 1 > view.from + view.span) return null;
    const box = map.getBoundingClientRect();
    return { x: box.left + xOf(shape, column + 0.5), y: box.top + yOf(shape, view.rowOf[cell.acid] + 0.5) };
  },
});
