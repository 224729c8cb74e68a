// Draws the readings of the server (schema drift.stats/1) as they come over /events. Times are seconds.
"use strict";

const WINDOW = 30; // seconds that the timeline shows
const LATE = 0.5; // seconds that its right edge stays behind, so that it is always drawn to the end
const SPARK = 120; // readings in the little curve

const at = (id) => document.getElementById(id);
const strip = []; // [start, stop, prefill, decode, mixed] in seconds on the server's clock, and units
const spark = [];
const still = matchMedia("(prefers-reduced-motion: reduce)");
let units = 0;
let serverTime = null; // of the latest reading, and when it came here
let receivedAt = 0;
let drawn = ""; // what the timeline shows
const colours = {};

function number(value, digits = 0) {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1) return number(value, 2) + " s";
  return number(value * 1000, value < 0.1 ? 1 : 0) + " ms";
}

function share(value, digits = 0) {
  return value === null || value === undefined ? "–" : number(value * 100, digits) + " %";
}

function fill(id, value, limits) {
  const bar = at(id);
  const part = Math.max(0, Math.min(1, value || 0));
  bar.style.width = (100 * part).toFixed(2) + "%";
  if (limits) bar.className = part >= 0.95 ? "full" : part >= 0.8 ? "high" : "";
}

function show(reading) {
  const { server, load, rates } = reading;
  if (serverTime !== null && reading.time_s < serverTime) strip.length = spark.length = 0; // another server's clock
  serverTime = reading.time_s;
  receivedAt = performance.now();
  units = server.units || 0;
  for (const piece of reading.strip) strip.push(piece);
  while (strip.length && strip[0][1] < serverTime - WINDOW - 2) strip.shift();
  showServer(server);
  showSplit(reading.split);
  at("running").textContent = number(load.running);
  at("running-of").textContent = server.max_running ? "of " + number(server.max_running) : "";
  fill("running-bar", server.max_running ? load.running / server.max_running : 0, true);
  const tokens = load.waiting_prefill_tokens;
  at("queue").textContent = number(load.waiting) + " waiting" + (tokens ? " (" + number(tokens) + " tokens)" : "");
  at("kv").textContent = number(load.used_pages);
  at("kv-of").textContent = "of " + number(load.total_pages);
  fill("kv-bar", load.kv_share, true);
  at("preemptions").textContent = number(load.preemptions) + " preemptions";
  at("hits").textContent = share(load.prefix_hit_share);
  fill("hits-bar", load.prefix_hit_share);
  at("prompts").textContent = number(load.cached_tokens) + " of " + number(load.prompt_tokens) + " tokens";
  at("tokens").textContent = number(rates.output_tokens_per_s);
  at("rates").textContent = number(rates.requests_per_s, 2) + " requests/s finished";
  at("goodput").textContent = number(reading.goodput, 2);
  curve(rates.output_tokens_per_s);
  showClasses(reading.classes);
  if (still.matches) draw();
}

function showServer(server) {
  const state = at("state");
  state.textContent = server.readiness + (server.phase ? ": " + server.phase + ", " + share(server.fraction) : "");
  state.className = "state " + server.readiness;
  const restarts = server.restarts ? " · engine restarted " + server.restarts + "×" : "";
  at("what").textContent = server.model
    ? `${server.model} on ${server.device}, ${server.units} units · ${server.dispatch}, ${server.partition}${restarts}`
    : "no model yet";
  document.title = server.model ? "Drift · " + server.model : "Drift";
}

function showSplit(split) {
  const whole = units || 1;
  const parts = { prefill: split.prefill_units, mixed: split.mixed_units, decode: split.decode_units };
  parts.idle = Math.max(0, whole - parts.prefill - parts.mixed - parts.decode);
  for (const [name, value] of Object.entries(parts)) {
    at("split-" + name).style.width = ((100 * value) / whole).toFixed(3) + "%";
  }
  const digits = whole >= 20 ? 0 : 1;
  const both = parts.mixed > 0.05 ? ` + both ${number(parts.mixed, digits)}` : "";
  at("split-words").textContent =
    `prefill ${number(parts.prefill, digits)}${both} + decode ${number(parts.decode, digits)} of ${units} units, ${split.sharing}`;
}

function curve(value) {
  if (value === null) return;
  spark.push(value);
  if (spark.length > SPARK) spark.shift();
  const top = Math.max(...spark, 1e-9);
  const left = SPARK - spark.length;
  const points = spark.map((v, i) => `${((100 * (left + i)) / (SPARK - 1)).toFixed(2)},${(23 - (22 * v) / top).toFixed(2)}`);
  document.querySelector("#spark polyline").setAttribute("points", points.join(" "));
}

function showClasses(classes) {
  at("no-classes").hidden = classes.length > 0;
  document.querySelector("table").hidden = classes.length === 0;
  at("classes").replaceChildren(...classes.map(row));
}

function row(entry) {
  const line = document.createElement("tr");
  const add = (text, kind) => {
    const cell = line.insertCell();
    cell.textContent = text;
    if (kind) cell.className = kind;
    return cell;
  };
  add(entry.name);
  add(number(entry.finished));
  for (const metric of ["ttft", "tbt"]) {
    const late = entry[metric + "_p99_s"] > entry[metric + "_target_s"];
    const target = entry[metric + "_target_s"];
    const kept = entry[metric + "_attainment"];
    add(seconds(entry[metric + "_p50_s"]));
    const cell = add(seconds(entry[metric + "_p99_s"]), target === null ? "" : late ? "bad" : "good");
    if (target !== null) cell.append(small("of " + seconds(target)));
    add(seconds(target));
    add(share(kept, 1), kept === null ? "" : kept >= 0.99 ? "good" : kept >= 0.9 ? "warn" : "bad");
  }
  return line;
}

function small(text) {
  const element = document.createElement("small"); // shown where there is no room for a column of targets
  element.textContent = text;
  return element;
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["prefill", "decode", "mixed", "idle"]) colours[name] = style.getPropertyValue("--" + name).trim();
}

// The timeline: prefill hangs from the top, decode stands on the bottom, the whole height is the whole device.
// Each column of pixels shows the average over its own stretch of time, on a grid that moves on by whole columns.
function draw() {
  const canvas = at("timeline");
  const ratio = devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * ratio);
  const height = Math.round(canvas.clientHeight * ratio);
  const step = WINDOW / Math.max(1, width);
  // Time stands still while nothing comes.
  const since = still.matches ? 0 : Math.min(1, (performance.now() - receivedAt) / 1000);
  const right = serverTime === null ? 0 : Math.floor((serverTime + since - LATE) / step) * step;
  const frame = [right, width, height, strip.length, colours.idle].join();
  if (frame === drawn || !width) return;
  drawn = frame;
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const pen = canvas.getContext("2d");
  pen.fillStyle = colours.idle;
  pen.fillRect(0, 0, width, height);
  if (serverTime === null || !units) return;
  const columns = averages(right - WINDOW, step, width);
  for (let x = 0; x < width; ) {
    let end = x + 1;
    while (end < width && same(columns, x, end)) end += 1;
    const [above, below, both] = [0, 1, 2].map((lane) => Math.round((height * columns[3 * x + lane]) / units));
    block(pen, colours.prefill, x, 0, end - x, above);
    block(pen, colours.mixed, x, above, end - x, both);
    block(pen, colours.decode, x, height - below, end - x, below);
    x = end;
  }
}

// Units of prefill, decode and both for each of `count` columns, three numbers a column.
function averages(left, step, count) {
  const sums = new Float64Array(3 * count);
  for (const [start, stop, prefill, decode, mixed] of strip) {
    const first = Math.max(0, Math.floor((start - left) / step));
    const last = Math.min(count - 1, Math.floor((stop - left) / step));
    for (let k = first; k <= last; k += 1) {
      const part = (Math.min(stop, left + (k + 1) * step) - Math.max(start, left + k * step)) / step;
      if (part <= 0) continue;
      sums[3 * k] += part * prefill;
      sums[3 * k + 1] += part * decode;
      sums[3 * k + 2] += part * mixed;
    }
  }
  return sums;
}

function same(columns, a, b) {
  for (let lane = 0; lane < 3; lane += 1) {
    if (Math.abs(columns[3 * a + lane] - columns[3 * b + lane]) > 1e-6) return false;
  }
  return true;
}

function block(pen, colour, x, y, width, height) {
  if (height <= 0) return;
  pen.fillStyle = colour;
  pen.fillRect(x, y, width, height);
}

function animate() {
  if (!still.matches) draw();
  requestAnimationFrame(animate);
}

function connect() {
  const events = new EventSource("events");
  events.onmessage = (event) => {
    at("lost").hidden = true;
    show(JSON.parse(event.data));
  };
  events.onerror = () => {
    at("lost").hidden = false;
    at("state").textContent = "no answer";
    at("state").className = "state gone";
    // The browser goes on trying where the connection failed, but not where it was refused with an answer.
    if (events.readyState === EventSource.CLOSED) {
      events.close();
      setTimeout(connect, 1000);
    }
  };
}

readColours();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readColours();
  draw();
});
addEventListener("resize", draw);
connect();
animate();
