"use strict";
// Filters, sorts and enlarges. The state is in the address after the #, so that a view can
// be linked to: q, category, sort, candidate, scorer, open=ROW.COLUMN. Texts reach the
// page as text nodes and attributes alone, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const controls = ["q", "category", "sort", "candidate", "scorer"].filter(byId);
const rows = byId("rows"), more = byId("more");
const CHUNK = 12;
let order = [], drawn = 0, open = null;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function value(id, otherwise) {
  return byId(id) ? byId(id).value : otherwise;
}

// How much better than the baseline a candidate's image is, above 0 for better.
function gain(row, column, scorer) {
  const mine = row.v[column][scorer], base = row.v[0][scorer];
  if (mine === null || base === null) return null;
  return data.scorers[scorer].lower ? base - mine : mine - base;
}

function number(x) {
  return x === null ? "–" : String(Number(x.toPrecision(4))).replace("-", "−");
}

function caption(row, column) {
  const made = element("figcaption");
  made.append(element("b", data.candidates[column]));
  data.scorers.forEach((scorer, k) => {
    const line = element("div", scorer.name + " " + number(row.v[column][k]));
    const better = column ? gain(row, column, k) : null;
    if (better !== null) {
      const change = scorer.lower ? -better : better;
      const sign = change > 0 ? "+" : "";
      const kind = better > 0 ? "up" : better < 0 ? "down" : "";
      line.append(" ", element("span", "(" + sign + number(change) + ")", kind));
    }
    made.append(line);
  });
  return made;
}

function source(row, column) {
  return "data:image/webp;base64," + row.i[column];
}

// Enlarged pixels of tiny images are squares.
function squares(event) {
  event.target.classList.toggle("pixelated", event.target.naturalWidth <= 96);
}

function drawRow(place) {
  const row = data.rows[order[place]];
  const made = element("div", undefined, "row");
  made.dataset.row = row.n;
  const title = element("h3", row.p + "  ");
  title.append(element("span", "seed " + row.s + (row.c ? " · " + row.c : "")));
  const cells = element("div", undefined, "cells");
  row.i.forEach((_, column) => {
    const figure = element("figure");
    const image = element("img", undefined, "enlarge");
    image.loading = "lazy";
    image.decoding = "async";
    image.tabIndex = 0;
    image.src = source(row, column);
    image.alt = data.candidates[column] + ": " + row.p;
    image.addEventListener("load", squares);
    image.addEventListener("click", () => enlarge(place, column));
    image.addEventListener("keydown", (event) => {
      if (event.key === "Enter") enlarge(place, column);
    });
    figure.append(image, caption(row, column));
    cells.append(figure);
  });
  made.append(title, cells);
  rows.append(made);
}

function drawMore() {
  for (let k = 0; k < CHUNK && drawn < order.length; k++) drawRow(drawn++);
}

function arrange() {
  const words = value("q", "").toLowerCase().split(/\s+/).filter(Boolean);
  const category = value("category", "");
  const column = Math.max(1, data.candidates.indexOf(value("candidate", "")));
  const names = data.scorers.map((scorer) => scorer.name);
  const scorer = Math.max(0, names.indexOf(value("scorer", "")));
  const sort = value("sort", "prompt");
  order = data.rows.map((_, k) => k).filter((k) => {
    const text = data.rows[k].p.toLowerCase();
    const fits = words.every((word) => text.includes(word));
    return fits && (!category || data.rows[k].c === category);
  });
  const keys = { worst: (g) => g, best: (g) => -g, difference: (g) => -Math.abs(g) };
  if (keys[sort] && data.candidates.length > 1 && data.scorers.length) {
    const key = new Map(order.map((k) => {
      const found = gain(data.rows[k], column, scorer);
      return [k, found === null ? Infinity : keys[sort](found)];
    }));
    order.sort((a, b) => key.get(a) - key.get(b) || a - b);
  }
  byId("count").textContent = order.length + " of " + data.rows.length + " rows";
  rows.replaceChildren();
  drawn = 0;
  drawMore();
  watch();
}

const dialog = element("dialog");
const large = element("img");
const words = element("p", undefined, "words");
const bar = element("p", undefined, "pages");
const back = element("button", "←"), forth = element("button", "→");
const full = element("a", "the file itself");
back.title = "previous image (left arrow)";
forth.title = "next image (right arrow)";
full.rel = "noopener noreferrer";
full.target = "_blank";
bar.append(back, full, forth);
dialog.append(large, words, bar);
document.body.append(dialog);
large.addEventListener("load", squares);
large.addEventListener("click", () => dialog.close());
back.addEventListener("click", () => move(-1));
forth.addEventListener("click", () => move(1));
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
dialog.addEventListener("close", () => { open = null; remember(); });
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) { event.preventDefault(); move(step); }
});

function enlarge(place, column) {
  const row = data.rows[order[place]];
  open = { place, column };
  large.src = source(row, column);
  large.alt = row.p;
  const scores = data.scorers.map((s, k) => s.name + " " + number(row.v[column][k]));
  words.textContent = [data.candidates[column] + ", seed " + row.s, ...scores].join(" · ")
    + "\n" + row.p;
  full.hidden = !row.l[column];
  // Under ./ a name with a colon is no scheme; % and # are part of it.
  full.href = "./" + row.l[column].split("/").map(encodeURIComponent).join("/");
  if (!dialog.open) dialog.showModal();
  remember();
}

function move(step) {
  if (!open) return;
  const many = data.candidates.length;
  const place = open.place * many + open.column + step;
  if (place < 0 || place >= order.length * many) return;
  while (Math.floor(place / many) >= drawn) drawMore();
  enlarge(Math.floor(place / many), place % many);
}

function remember() {
  const state = new URLSearchParams();
  for (const id of controls) if (byId(id).value) state.set(id, byId(id).value);
  if (open) state.set("open", data.rows[order[open.place]].n + "." + open.column);
  history.replaceState(null, "", "#" + state);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const id of controls) {
    const wanted = state.get(id);
    const known = byId(id).options;
    if (wanted !== null && (!known || [...known].some((o) => o.value === wanted))) {
      byId(id).value = wanted;
    }
  }
  arrange();
  const [number, column] = (state.get("open") || "").split(".").map(Number);
  const place = order.findIndex((k) => data.rows[k].n === number);
  if (state.has("open") && place >= 0 && column < data.candidates.length) {
    while (place >= drawn) drawMore();
    enlarge(place, column);
  }
}

// Asked anew after every chunk: an end that stays in sight makes no further event.
const observer = new IntersectionObserver((seen) => {
  if (!seen.some((entry) => entry.isIntersecting) || drawn >= order.length) return;
  drawMore();
  watch();
}, { rootMargin: "1500px" });

function watch() {
  observer.unobserve(more);
  observer.observe(more);
}

for (const id of controls) {
  byId(id).addEventListener("input", () => { arrange(); remember(); });
}
window.addEventListener("hashchange", recall);
document.documentElement.classList.add("js");
recall();
