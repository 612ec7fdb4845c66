// What all views share: data that scripts hand over, the address, the document, figures in words.
"use strict";

const paravt = (() => {
  const pieces = new Map();
  const waiting = new Map();

  // Data scripts call this: `paravt.receive("run", {...})`.
  function receive(name, value) {
    pieces.set(name, value);
    waiting.get(name)?.resolve(value);
    waiting.delete(name);
  }

  // A page from disk may not fetch; it may load scripts.
  function load(name) {
    if (pieces.has(name)) return Promise.resolve(pieces.get(name));
    if (waiting.has(name)) return waiting.get(name).promise;
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, {resolve, reject}));
    waiting.set(name, entry);
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onerror = () => {
      waiting.delete(name);
      entry.reject(new Error(`data/${name}.js is not there`));
    };
    document.head.append(script);
    return entry.promise;
  }

  const stepName = (step) => `step_${String(step).padStart(6, "0")}`;

  // `#/rollout?step=3&group=0`: the view, and what it is asked for.
  function address() {
    const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
    return {view: path || "run", query: new URLSearchParams(query || "")};
  }

  function link(view, query) {
    const text = new URLSearchParams(
      Object.entries(query || {}).filter(([, value]) => value !== "" && value != null && value !== false)
    ).toString();
    return `#/${view}${text ? `?${text}` : ""}`;
  }

  // An element. Strings become text, never markup: most of them were written by a model.
  function el(tag, properties, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (value == null || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [k, v] of Object.entries(value)) element.style.setProperty(k, v);
      else if (name === "value") element.value = value;
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
    return element;
  }

  // What a model wrote.
  const said = (text, tag = "span") => el(tag, {class: "model", dir: "auto"}, text);

  function number(value, digits = 3) {
    if (value == null || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
    return Number(value.toPrecision(digits)).toString().replace("-", "−");
  }

  const percent = (value) => (value == null ? "–" : `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`);

  function clock(seconds) {
    if (seconds == null) return "–";
    if (seconds < 100) return `${number(seconds)} s`;
    const rest = Math.round(seconds);
    const parts = [Math.floor(rest / 3600), Math.floor(rest / 60) % 60, rest % 60];
    const shown = parts[0] ? parts : parts.slice(1);
    return shown.map((part, at) => (at ? String(part).padStart(2, "0") : part)).join(":");
  }

  const plain = (value) => (value === null || value === undefined ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value));

  const NAMES = {oe: "open", mcq: "choice", tvg: "grounding"};
  const typeName = (type) => NAMES[type] || type;

  function theme(next) {
    const root = document.documentElement;
    const kept = next || stored() || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = kept;
    if (next) try { localStorage.setItem("paravt-theme", next); } catch { /* not kept, then */ }
    return kept;
  }
  function stored() {
    try { return localStorage.getItem("paravt-theme"); } catch { return null; }
  }

  return {receive, load, stepName, address, link, el, said, number, percent, clock, plain, typeName, theme, views: {}};
})();
window.paravt = paravt;
