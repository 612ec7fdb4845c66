// All rollouts of a run, filtered and sorted by what the address says.
"use strict";

(() => {
  const {el, number, link, typeName} = paravt;
  const PAGE = 100;

  // What can be asked for, by its name in the address.
  const SWITCHES = {
    wrong: ["wrong", (rows, at) => rows.accuracy[at] < 0.5],
    malformed: ["malformed", (rows, at) => !rows.complies[at]],
    notool: ["no call", (rows, at) => rows.calls[at] === 0],
    missed: ["missed the gold window", (rows, at) => rows.calls[at] > 0 && rows.hits[at] === 0],
    invalid: ["an invalid call", (rows, at) => rows.invalid[at] > 0],
  };
  const SORTS = {worst: "lowest reward first", best: "highest reward first", first: "first steps first", last: "last steps first"};
  const NAMES = [...Object.keys(SWITCHES), "step", "type", "min", "max", "sort"];

  // Places in the index that pass; also what the arrow keys of a rollout walk through.
  function matching(rows, query) {
    const switches = Object.entries(SWITCHES).filter(([name]) => query.get(name)).map(([, [, test]]) => test);
    const bound = (name, otherwise) => (query.get(name) === null || query.get(name) === "" ? otherwise : Number(query.get(name)));
    const step = bound("step", null), low = bound("min", -Infinity), high = bound("max", Infinity);
    const type = query.get("type") ? rows.types.indexOf(query.get("type")) : null;
    const found = [];
    for (let at = 0; at < rows.step.length; at++) {
      if (step !== null && rows.step[at] !== step) continue;
      if (type !== null && rows.type[at] !== type) continue;
      if (rows.reward[at] < low || rows.reward[at] > high) continue;
      if (switches.every((test) => test(rows, at))) found.push(at);
    }
    return sorted(rows, found, query.get("sort") || "worst");
  }

  function sorted(rows, found, how) {
    const by = {worst: (a, b) => rows.reward[a] - rows.reward[b] || rows.step[b] - rows.step[a], best: (a, b) => rows.reward[b] - rows.reward[a] || rows.step[b] - rows.step[a], first: (a, b) => a - b, last: (a, b) => rows.step[b] - rows.step[a] || a - b}[how];
    return by ? found.sort(by) : found;
  }

  const kept = (query) => Object.fromEntries(NAMES.map((name) => [name, query.get(name)]));

  function filters(rows, query) {
    const set = (name, value) => { location.hash = link("rollouts", {...kept(query), [name]: value}); };
    const box = ([name, [words]]) => el("label", {}, el("input", {type: "checkbox", name, checked: query.get(name), onchange: (e) => set(name, e.target.checked ? "1" : "")}), words);
    const field = (name, words) => el("label", {}, `${words} `, el("input", {type: "number", step: "any", name, value: query.get(name) || "", onchange: (e) => set(name, e.target.value)}));
    const choice = (name, options) => el("select", {name, "aria-label": name, onchange: (e) => set(name, e.target.value)},
      options.map(([value, words]) => el("option", {value, selected: (query.get(name) || "") === value}, words)));
    return el("div", {class: "filters", role: "search"},
      Object.entries(SWITCHES).map(box),
      field("step", "step"), field("min", "reward from"), field("max", "to"),
      choice("type", [["", "all questions"], ...rows.types.map((type) => [type, typeName(type)])]),
      choice("sort", Object.entries(SORTS).map(([name, words]) => [name === "worst" ? "" : name, words])));
  }

  const HEAD = [["step", "num tight"], ["reward", "num tight"], ["accuracy", "num tight"], ["calls", "num tight hide-narrow"], ["", "tight"], ["question", ""], ["", "hide-narrow"]];

  function line(rows, at, query) {
    const href = link("rollout", {step: rows.step[at], group: rows.group[at], rollout: rows.rollout[at], ...prefixed(query)});
    const calls = rows.calls[at] ? `${rows.calls[at]}` : "–";
    return el("tr", {class: "link", onclick: (event) => { if (!event.target.closest("a")) location.hash = href; }},
      el("td", {class: "num"}, String(rows.step[at])),
      el("td", {class: "num"}, number(rows.reward[at])),
      el("td", {class: "num"}, number(rows.accuracy[at], 2)),
      el("td", {class: "num hide-narrow"}, calls),
      el("td", {class: "tight"}, verdict(rows, at)),
      el("td", {}, el("a", {href, class: "model", dir: "auto"}, rows.questions[rows.question[at]])),
      el("td", {class: "hide-narrow"}, el("a", {class: "soft", href: link("group", {step: rows.step[at], group: rows.group[at]})}, "group")));
  }

  function verdict(rows, at) {
    const chips = [];
    if (rows.accuracy[at] < 0.5) chips.push(el("span", {class: "chip bad"}, "wrong"));
    if (!rows.complies[at]) chips.push(el("span", {class: "chip bad"}, "malformed"));
    if (!rows.calls[at]) chips.push(el("span", {class: "chip"}, "no call"));
    else if (rows.hits[at]) chips.push(el("span", {class: "chip good"}, "saw gold"));
    return chips.flatMap((chip) => [chip, " "]);
  }

  // Filters travel with a rollout under names of their own, beside its step.
  const prefixed = (query) => Object.fromEntries(Object.entries(kept(query)).filter(([, value]) => value).map(([name, value]) => [name === "step" ? "in" : name, value]));
  function unprefixed(query) {
    const own = Object.fromEntries(NAMES.filter((name) => name !== "step").map((name) => [name, query.get(name)]));
    return new URLSearchParams(Object.entries({...own, step: query.get("in")}).filter(([, value]) => value));
  }

  paravt.views.rollouts = async (query) => {
    const rows = await paravt.load("index");
    if (!rows.step.length) return el("div", {}, el("h1", {}, "Rollouts"), el("p", {class: "empty"}, "This run keeps no rollouts."));
    const found = matching(rows, query), body = el("tbody", {});
    let shown = 0;
    const more = el("button", {onclick: show}, "Show more");
    function show() {
      body.append(...found.slice(shown, shown + PAGE).map((at) => line(rows, at, query)));
      shown += PAGE;
      more.hidden = shown >= found.length;
    }
    show();
    return el("div", {},
      el("h1", {}, "Rollouts"),
      el("a", {class: "json soft small", href: "data/index.json"}, "JSON"),
      el("p", {class: "lead", "data-count": found.length}, `${found.length.toLocaleString("en")} of ${rows.step.length.toLocaleString("en")}.`),
      filters(rows, query),
      found.length ? el("div", {class: "scroll"}, el("table", {class: "rollouts"}, el("thead", {}, el("tr", {}, HEAD.map(([text, kind]) => el("th", {class: kind}, text)))), body)) : el("p", {class: "empty"}, "None is like this. Take a filter away."),
      more);
  };

  Object.assign(paravt, {matching, prefixed, unprefixed});
})();
