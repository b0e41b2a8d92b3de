"use strict";
// What is known of the protein, and what the page shows of it: no drawing, no events. Scores are null where unknown.

const data = JSON.parse(document.getElementById("data").textContent);
const ACIDS = data.amino_acids;
const LENGTH = data.wild_type.length;
const known = (value) => value !== null;

const own = Array.from(data.wild_type, (letter) => ACIDS.indexOf(letter));
const isGiven = (site, acid) => data.given[site].includes(ACIDS[acid]);

/** The score of a substitution; null at the wild type's own residue, too. */
function scoreOf(site, acid) {
  return acid === own[site] ? null : data.scores[site][acid];
}

function meanOf(values) {
  const there = values.filter(known);
  return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : null;
}

const sites = Array.from({ length: LENGTH }, (_, site) => site);
const acids = Array.from(ACIDS, (_, acid) => acid);
const siteMeans = sites.map((site) => meanOf(acids.map((acid) => scoreOf(site, acid))));
const acidMeans = acids.map((acid) => meanOf(sites.map((site) => scoreOf(site, acid))));
const entropies = data.entropy;
const ranked = sites.flatMap((site) => acids.map((acid) => scoreOf(site, acid))).filter(known).sort((a, b) => a - b);

const givenCount = sites.flatMap((site) => acids.filter((acid) => isGiven(site, acid) && known(scoreOf(site, acid)))).length;
/** Boxes around more of the cells than this would mark nothing. */
const marksGiven = givenCount > 0 && givenCount <= 0.25 * ranked.length;

/** How many of the sorted scores are below the value, or at most the value. */
function countBelow(value, included) {
  let low = 0;
  let high = ranked.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ranked[middle] < value || (included && ranked[middle] === value)) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Places by a value, the ones without a value last; equal ones stay in the order of the protein. */
function sortedBy(places, values, sign) {
  return [...places].sort((a, b) => {
    if (!known(values[a]) || !known(values[b])) return known(values[b]) - known(values[a]) || a - b;
    return sign * (values[a] - values[b]) || a - b;
  });
}

const POSITION_ORDERS = {
  position: () => sites,
  mean: () => sortedBy(sites, siteMeans, 1),
  ...(entropies && { entropy: () => sortedBy(sites, entropies, 1) }),
};
const ACID_ORDERS = {
  chemistry: () => data.groups.flatMap(([, letters]) => Array.from(letters, (letter) => ACIDS.indexOf(letter))),
  alphabet: () => acids,
  mean: () => sortedBy(acids, acidMeans, -1),
};

/** What is shown. `from` and `span` are in columns; cells are {site, acid} or null. */
const view = {
  positionOrder: "position",
  acidOrder: "chemistry",
  columns: sites,
  rows: ACID_ORDERS.chemistry(),
  columnOf: sites,
  rowOf: [],
  from: 0,
  span: LENGTH,
  selected: null,
  hovered: null,
  pinned: false,
};
const SHORTEST_SPAN = Math.min(8, LENGTH);

function inverse(order) {
  const places = new Array(order.length);
  order.forEach((item, place) => (places[item] = place));
  return places;
}

function sortPositions(name) {
  view.positionOrder = name;
  view.columns = POSITION_ORDERS[name]();
  view.columnOf = inverse(view.columns);
}

function sortAcids(name) {
  view.acidOrder = name;
  view.rows = ACID_ORDERS[name]();
  view.rowOf = inverse(view.rows);
}

/** Shows `span` columns from `from`, kept within the protein. */
function show(from, span) {
  view.span = Math.min(LENGTH, Math.max(SHORTEST_SPAN, span));
  view.from = Math.min(LENGTH - view.span, Math.max(0, from));
}

/** Zooms by a factor around a column that stays where it is on the screen. */
function zoom(factor, column) {
  const span = Math.min(LENGTH, Math.max(SHORTEST_SPAN, view.span / factor));
  show(column - ((column - view.from) / view.span) * span, span);
}

/** Moves the view as little as needed for a column to be seen. */
function reveal(column) {
  if (column < view.from) show(column, view.span);
  else if (column + 1 > view.from + view.span) show(column + 1 - view.span, view.span);
}

function nameOf(cell) {
  return cell && `${data.wild_type[cell.site]}${cell.site + data.first}${ACIDS[cell.acid]}`;
}

/** A number of about three digits, with a true minus. */
function shown(value) {
  if (!known(value)) return "not known";
  return Number(value.toPrecision(3)).toString().replace("-", "\u2212");
}

/** What is told of a cell: [name, [term, text] ...]. */
function describe({ site, acid }) {
  const facts = [];
  const name = nameOf({ site, acid });
  const isOwn = acid === own[site];
  const score = scoreOf(site, acid);
  if (!isOwn) {
    facts.push(["score", shown(score)]);
    if (known(score)) {
      const above = ranked.length - countBelow(score, true);
      const share = Math.floor((100 * countBelow(score, false)) / ranked.length);
      facts.push(["rank", `${(above + 1).toLocaleString("en")} of ${ranked.length.toLocaleString("en")}`]);
      facts.push(["higher than", `${share} % of all`]);
    }
  }
  facts.push(["wild type", `${data.wild_type[site]}${site + data.first}`]);
  facts.push(["mean score here", shown(siteMeans[site])]);
  if (entropies) facts.push(["entropy", known(entropies[site]) ? `${shown(entropies[site])} nats` : "not known"]);
  if (!isOwn) facts.push(["named in the table", isGiven(site, acid) ? "yes" : "no"]);
  return [isOwn ? `${name} (wild type)` : name, facts];
}

/** The cell of "A24G", "A24" or "24"; a string says what is wrong with it. */
function find(query) {
  const match = /^([A-Z])?(\d+)([A-Z])?$/i.exec(query.trim());
  if (!match) return `“${query}” is not spelt like A24G, A24 or 24`;
  const site = Number(match[2]) - data.first;
  if (!(site >= 0 && site < LENGTH)) return `no residue ${match[2]}: there are ${data.first} to ${data.first + LENGTH - 1}`;
  const before = (match[1] || data.wild_type[site]).toUpperCase();
  if (before !== data.wild_type[site]) return `residue ${match[2]} is ${data.wild_type[site]}, not ${before}`;
  const letter = match[3] && match[3].toUpperCase();
  if (letter && !ACIDS.includes(letter)) return `${letter} is not one of the 20 amino acids`;
  return { site, acid: letter ? ACIDS.indexOf(letter) : Math.max(0, own[site]) };
}

/** All that is known, or was asked for, as CSV. */
function table() {
  const lines = ["variant,position,wild_type,mutant,score,entropy,given"];
  for (const site of sites) {
    for (const acid of acids) {
      const score = scoreOf(site, acid);
      const named = isGiven(site, acid);
      if (acid === own[site] || !(known(score) || named)) continue;
      const entropy = entropies ? entropies[site] : null;
      const fields = [nameOf({ site, acid }), site + data.first, data.wild_type[site], ACIDS[acid], score, entropy, +named];
      lines.push(fields.map((field) => (known(field) ? field : "")).join(","));
    }
  }
  return lines.join("\r\n") + "\r\n";
}

sortAcids("chemistry");
// A scan of a part of a protein opens at that part.
const firstKnown = siteMeans.findIndex(known);
if (firstKnown >= 0) show(firstKnown, siteMeans.findLastIndex(known) + 1 - firstKnown);
