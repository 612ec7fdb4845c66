// Starts the page: the bar, the keys, and the view that the address names.
"use strict";

(() => {
  const {el, link} = paravt;
  const VIEWS = {run: "Run", rollouts: "Rollouts"};
  let asked = 0;

  function bar(view, name) {
    const current = {run: "run", rollouts: "rollouts", group: "rollouts", rollout: "rollouts"}[view];
    document.getElementById("bar").replaceChildren(
      el("a", {class: "name", href: link("run")}, name),
      el("nav", {"aria-label": "Views"}, Object.entries(VIEWS).map(([key, words]) => el("a", {href: link(key), "aria-current": key === current ? "page" : null}, words))),
      el("button", {class: "quiet", id: "theme", title: "Light or dark (d)", onclick: flip}, document.documentElement.dataset.theme === "dark" ? "Light" : "Dark"),
      el("button", {class: "quiet hide-narrow", title: "Keys (?)", onclick: help}, "Keys"));
  }

  function flip() {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    paravt.theme(next);
    document.getElementById("theme").textContent = next === "dark" ? "Light" : "Dark";
  }

  async function show() {
    const {view, query} = paravt.address(), main = document.getElementById("view"), mine = ++asked;
    const draw = paravt.views[view] || paravt.views.run;
    paravt.keys = {};
    document.getElementById("tip").hidden = true;
    let made;
    try {
      const run = await paravt.load("run");
      document.title = view === "run" ? run.name : `${view} · ${run.name}`;
      bar(paravt.views[view] ? view : "run", run.name);
      made = await draw(query);
    } catch (error) {
      made = el("p", {class: "empty"}, `This cannot be shown: ${error.message}`);
    }
    if (mine !== asked) return; // another address was asked for meanwhile
    const same = show.last === view + (query.get("step") || "") + (query.get("group") || "") + (query.get("rollout") || "");
    main.replaceChildren(made);
    if (!same) scrollTo(0, 0);
    show.last = view + (query.get("step") || "") + (query.get("group") || "") + (query.get("rollout") || "");
    document.body.dataset.view = view;
  }

  const KEYS = [["r", "the run"], ["b", "all rollouts"], ["g", "the group of a rollout"], ["← →", "the next one that the filters leave; the next group"], ["↑ ↓", "the next rollout of the group"], ["c", "colour tokens by the next figure"], ["e", "unfold or fold all"], ["d", "light or dark"], ["?", "this list"]];

  function help() {
    const dialog = document.getElementById("help");
    dialog.replaceChildren(el("h3", {}, "Keys"), el("table", {}, KEYS.map(([key, words]) => el("tr", {}, el("td", {}, el("kbd", {}, key)), el("td", {}, words)))), el("form", {method: "dialog"}, el("button", {}, "Close")));
    dialog.showModal();
  }

  const COMMON = {r: () => { location.hash = link("run"); }, b: () => { location.hash = link("rollouts"); }, d: flip, "?": help};

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const act = (paravt.keys || {})[event.key] || COMMON[event.key];
    if (!act || document.getElementById("help").open) return;
    event.preventDefault();
    act();
  });
  addEventListener("hashchange", show);
  paravt.theme();
  show();
})();
