// The view of a run: how it learned, where it looked, what came of it, how it was set.
"use strict";

(() => {
  const {el, number, percent, plain, link, SERIES} = paravt;
  const OTHER = "var(--other)";

  // Panels of curves: a title, the metrics in it, and how they are shown.
  const PANELS = [
    {title: "Reward", metrics: {"reward/total": "total", "reward/accuracy": "accuracy", "reward/format": "format", "reward/tool": "tool"}},
    {title: "Accuracy", metrics: {"reward/accuracy": "sampled, training prompts"}, zero: true},
    {title: "Format", metrics: {"format/compliance": "strictly well-formed", "format/score": "format reward"}},
    {title: "Calls", metrics: {"tool/calls_per_rollout": "per rollout", "tool/rollouts_with_call": "share with a call", "tool/success_rate": "share that ran"}, zero: true},
    {title: "Frame budget K", metrics: {"frames/budget_mean": "mean"}},
    {title: "Sampler against learner", metrics: {"logprob/gap_mean": "mean gap", "logprob/gap_max": "largest"}, log: true},
    {title: "Weights for the sampler", metrics: {"correction/effective_share": "effective share of tokens", "dropped_fraction": "masked", "correction/rejected": "rejected"}, zero: true},
    {title: "KL to the reference", metrics: {kl: "KL"}},
    {title: "Entropy", metrics: {entropy: "nats per token"}},
    {title: "Generated tokens", metrics: {"length/generated": "per rollout"}},
    {title: "Loss", metrics: {loss: "loss"}},
    {title: "Gradient norm", metrics: {grad_norm: "norm"}},
    {title: "Groups without spread", metrics: {"group/zero_std": "share"}, zero: true},
  ];
  const PARTS = {"time/rollout": "rollout", "time/learn": "learn", "time/data": "data", "time/evaluate": "evaluate"};

  const has = (run, name) => (run.metrics[name] || []).some((value) => value != null);

  function series(run, names, other) {
    const own = Object.entries(names).filter(([metric]) => has(run, metric)).map(([metric, name], at) => ({
      name, color: SERIES[at], steps: run.metrics.step, values: run.metrics[metric], band: run.bands[metric],
    }));
    if (!other) return own;
    return own.concat(Object.entries(names).filter(([metric]) => has(other, metric)).map(([metric, name], at) => ({
      name: `${name}, ${other.name}`, color: at ? `color-mix(in srgb, ${SERIES[at]} 45%, var(--paper))` : OTHER, dashed: true,
      steps: other.metrics.step, values: other.metrics[metric], band: other.bands[metric],
    })));
  }

  const open = (step) => { location.hash = link("rollouts", {step}); };

  function panels(run) {
    const shown = PANELS.map((panel) => ({...panel, series: series(run, panel.metrics, run.other)})).filter((panel) => panel.series.length);
    const charts = shown.map((panel) => paravt.curves(panel.title, panel.series, {log: panel.log, zero: panel.zero, onstep: run.steps.length ? open : null}));
    return el("div", {class: "charts"}, charts, seconds(run));
  }

  function seconds(run) {
    const parts = Object.entries(PARTS).filter(([metric]) => has(run, metric)).map(([metric, name], at) => ({name, color: SERIES[at], values: run.metrics[metric]}));
    return parts.length ? paravt.areas("Seconds of a step", run.metrics.step, parts) : null;
  }

  function tile(label, value, note, from, other) {
    return el("div", {class: "tile"}, el("div", {class: "label"}, label),
      el("div", {class: "value"}, from != null ? el("span", {class: "from"}, `${from} → `) : null, value),
      el("div", {class: "note"}, note || ""), other ? el("div", {class: "note"}, other) : null);
  }

  // What another run came to, in the words of a tile.
  const beside = (other, pair, show) => (other && pair ? `${other.name}: ${show(pair[0], 2)} → ${show(pair[1], 2)}` : null);

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const ends = (run, name) => {
    const values = (run.metrics[name] || []).filter((value) => value != null);
    const k = Math.max(1, Math.min(5, Math.floor(values.length / 4)));
    return values.length ? [mean(values.slice(0, k)), mean(values.slice(-k))] : null;
  };

  function tiles(run) {
    const found = [], {other} = run;
    const held = (own) => (own?.evaluation.before?.sampled && own.evaluation.after?.sampled ? [own.evaluation.before.sampled.accuracy, own.evaluation.after.sampled.accuracy] : null);
    if (held(run)) {
      const own = run.evaluation.after.sampled;
      found.push(tile("Held-out accuracy, sampled", number(own.accuracy, 2), own["accuracy/low"] == null ? "" : `95 %: ${number(own["accuracy/low"], 2)} to ${number(own["accuracy/high"], 2)}`, number(held(run)[0], 2), beside(other, held(other), number)));
    }
    for (const [name, label, show] of [["reward/accuracy", "Accuracy in training", number], ["reward/total", "Reward", number], ["format/compliance", "Well-formed", percent], ["tool/calls_per_rollout", "Calls per rollout", number], ...(run.stage === "sft" ? [["loss", "Loss", number]] : [])]) {
      const pair = ends(run, name);
      if (pair && found.length < 4) found.push(tile(label, show(pair[1], 2), "first and last steps", show(pair[0], 2), beside(other, other && ends(other, name), show)));
    }
    const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
    const time = run.metrics["time/step"], theirs = other?.metrics["time/step"];
    if (time) found.push(tile("Seconds per step", number(median(time), 3), `median of ${time.length} steps`, null, theirs ? `${other.name}: ${number(median(theirs), 3)}` : null));
    return el("div", {class: "tiles"}, found);
  }

  function evaluation(run) {
    const found = [run, run.other].filter(Boolean).map((own) => [own, beforeAfter(own)]).filter(([, shown]) => shown);
    if (!found.length) return null;
    return [
      el("h2", {}, "Before and after"),
      el("p", {class: "soft"}, "Accuracy on held-out questions, with 95 % intervals."),
      found.map(([own, shown]) => [run.other ? el("h3", {}, own.name) : null, shown]),
    ];
  }

  function beforeAfter(run) {
    const rows = [];
    for (const when of ["before", "after"]) {
      for (const [mode, own] of Object.entries(run.evaluation[when] || {})) {
        if (own.accuracy != null) rows.push({mode, when, mean: own.accuracy, low: own["accuracy/low"] ?? own.accuracy, high: own["accuracy/high"] ?? own.accuracy});
      }
    }
    return rows.length ? el("div", {class: "columns"}, paravt.intervals("Accuracy", rows), el("div", {class: "scroll"}, table(run.evaluation))) : null;
  }

  function table(evaluation) {
    const modes = [...new Set([...Object.keys(evaluation.before || {}), ...Object.keys(evaluation.after || {})])];
    const names = new Set();
    for (const part of Object.values(evaluation)) for (const own of Object.values(part)) for (const name of Object.keys(own)) if (!/\/(low|high|videos)$/.test(name)) names.add(name);
    const cell = (when, mode, name) => (Object.keys(evaluation[when] || {}).length ? number(evaluation[when][mode]?.[name], 3) : null);
    const pair = (mode, name) => [cell("before", mode, name), cell("after", mode, name)].filter((text) => text !== null);
    return el("table", {},
      el("thead", {}, el("tr", {}, el("th", {}, ""), modes.map((mode) => el("th", {class: "num"}, mode)))),
      el("tbody", {}, [...names].map((name) => el("tr", {}, el("td", {class: "key"}, name),
        modes.map((mode) => el("td", {class: "num"}, pair(mode, name).join(" → ")))))));
  }

  function settings(run) {
    const rows = run.departures.map(([name, recipe, own]) => el("tr", {}, el("td", {class: "key"}, name), el("td", {class: "key"}, plain(recipe)), el("td", {class: "key"}, plain(own))));
    const other = run.other ? Object.keys({...run.settings, ...run.other.settings}).filter((name) => plain(run.settings[name]) !== plain(run.other.settings[name])) : [];
    return [
      el("h2", {}, "Configuration"),
      rows.length ? el("p", {class: "soft"}, `What departs from the recipe ${run.recipe}.`) : el("p", {class: "soft"}, `Exactly the recipe ${run.recipe}.`),
      rows.length ? el("div", {class: "scroll"}, el("table", {}, el("thead", {}, el("tr", {}, ["setting", "recipe", "this run"].map((text) => el("th", {}, text)))), el("tbody", {}, rows))) : null,
      other.length ? el("div", {class: "scroll"}, el("p", {class: "soft"}, `What differs from ${run.other.name}.`), el("table", {},
        el("thead", {}, el("tr", {}, ["setting", run.name, run.other.name].map((text) => el("th", {}, text)))),
        el("tbody", {}, other.map((name) => el("tr", {}, el("td", {class: "key"}, name), el("td", {class: "key"}, plain(run.settings[name])), el("td", {class: "key"}, plain(run.other.settings[name]))))))) : null,
      el("details", {class: "plain"}, el("summary", {}, `All ${Object.keys(run.settings).length} settings`),
        el("div", {class: "scroll"}, el("table", {}, el("tbody", {}, Object.entries(run.settings).map(([name, value]) => el("tr", {}, el("td", {class: "key"}, name), el("td", {class: "key"}, plain(value)))))))),
    ];
  }

  function anyMetric(run, query) {
    const names = Object.keys(run.metrics).filter((name) => name !== "step").sort();
    const place = el("div", {class: "charts"});
    const show = (name) => place.replaceChildren(paravt.curves(name, series(run, {[name]: name}, run.other), {wide: true, height: 240}));
    const chosen = [query.get("metric"), "reward/total", "loss", names[0]].find((name) => names.includes(name));
    const select = el("select", {"aria-label": "Metric", onchange: (event) => { history.replaceState(null, "", link("run", {metric: event.target.value})); show(event.target.value); }},
      names.map((name) => el("option", {value: name, selected: name === chosen}, name)));
    if (chosen) show(chosen);
    return [el("h2", {}, "Any metric"), el("p", {class: "soft"}, "All that metrics.jsonl holds."), select, place];
  }

  function looks(run) {
    if (!run.look) return null;
    return [
      el("h2", {}, "Where it looks"),
      el("p", {class: "soft"}, "The share of rollouts that cropped each moment, by its distance from the window where the answer can be seen. Good policies are dark between the golden lines."),
      el("div", {class: run.other?.look ? "columns" : "charts"}, paravt.heat(run.name, run.look), run.other?.look ? paravt.heat(run.other.name, run.other.look) : null),
    ];
  }

  // Another run is shown by its curves and tables; its rollouts are on its own page.
  function compared(other) {
    const way = other.page ? el("a", {href: `${other.page}#/rollouts`}, "its rollouts") : null;
    const lines = `Dashed: `, steps = ` (${other.recipe}, ${other.metrics.step?.length || 0} steps`;
    return [lines, other.page ? el("a", {href: other.page}, el("strong", {}, other.name)) : el("strong", {}, other.name), steps, way ? [", ", way] : "", "). "];
  }

  paravt.views.run = async (query) => {
    const run = await paravt.load("run");
    const done = run.metrics.step?.length || 0;
    return el("div", {},
      el("h1", {}, run.name),
      el("a", {class: "json soft small", href: "data/run.json"}, "JSON"),
      el("p", {class: "lead"}, `${run.recipe}, ${done} of ${run.planned_steps} steps. `,
        run.other ? compared(run.other) : null,
        run.steps.length ? el("a", {href: link("rollouts", {sort: "worst"})}, "See the worst rollouts") : null),
      tiles(run),
      el("h2", {}, "Learning"),
      el("p", {class: "soft small"}, run.steps.length ? "Bands are 95 % intervals over prompts. A click on a step shows its rollouts." : "Thin lines are single steps, thick ones running means."),
      done ? panels(run) : el("p", {class: "empty"}, "No step is finished yet."),
      looks(run), evaluation(run), settings(run), done ? anyMetric(run, query) : null);
  };
})();
