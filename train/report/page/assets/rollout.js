// The views of a group and of a rollout.
"use strict";

(() => {
  const {el, said, number, percent, clock, link, typeName} = paravt;
  const MOST_TOKENS = 3000; // of a fold, before one asks for more
  const MOST_TEXT = 20000;
  const FILM = 64; // pixels of a small frame's height

  async function found(query) {
    const step = Number(query.get("step") || 0), data = await paravt.load(paravt.stepName(step));
    const number = Math.min(Number(query.get("group") || 0), data.groups.length - 1);
    return {step, number, group: data.groups[number], groups: data.groups.length};
  }

  function crumbs(parts, json) {
    return el("div", {class: "crumbs"}, el("span", {}, parts), el("a", {href: `data/${json}.json`, class: "soft"}, "JSON"));
  }

  function facts(group, more = []) {
    const gold = (group.gold || []).map(([start, end]) => `${clock(start)} to ${clock(end)}`).join(", ");
    const rows = [["Gold answer", said(group.answer)], gold && ["Gold window", gold], ...more,
      ["Video", [said(group.video), el("span", {class: "soft"}, ` ${group.duration ? `${clock(group.duration)}, ` : ""}${group.frame_budget} overview frames`)]]].filter(Boolean);
    return el("dl", {class: "facts"}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }

  // --- A group

  paravt.views.group = async (query) => {
    const {step, number: place, group, groups} = await found(query);
    const order = group.rollouts.map((_, at) => at).sort((a, b) => group.rollouts[b].rewards.total - group.rollouts[a].rewards.total);
    const neighbour = (by) => ({step, group: (place + by + groups) % groups});
    paravt.keys = {
      ArrowLeft: () => { location.hash = link("group", neighbour(-1)); },
      ArrowRight: () => { location.hash = link("group", neighbour(1)); },
    };
    return el("div", {},
      crumbs([el("a", {href: link("rollouts", {step})}, `Step ${step}`), ` · prompt ${place + 1} of ${groups} · `, el("a", {href: link("group", neighbour(-1))}, "previous"), " ", el("a", {href: link("group", neighbour(1))}, "next")], paravt.stepName(step)),
      el("h1", {}, said(group.question)),
      facts(group, [["Type", typeName(group.question_type)]]),
      overview(group),
      el("h2", {}, `${order.length} rollouts, by reward`),
      el("p", {class: "soft small"}, "Gold: where the answer can be seen. Blue calls saw some of it, grey ones none, red ones were invalid."),
      el("div", {class: "lanes"}, order.map((at) => lane(group, at, {step, group: place, rollout: at}))));
  };

  function lane(group, at, place) {
    const own = group.rollouts[at];
    return el("a", {class: "lane", href: link("rollout", place)},
      el("span", {class: "who"}, el("span", {class: "reward"}, number(own.rewards.total)), el("span", {class: `chip ${own.right ? "good" : "bad"}`}, own.right ? "right" : "wrong"), said(own.said || "no answer")),
      paravt.timeline(group, own, {small: true}));
  }

  // --- Frames

  function film(group, place, gold) {
    if (!place || !group.sheet) return null;
    const sheet = group.sheet, scale = FILM / sheet.height;
    const px = (value) => `${value * scale}px`;
    return el("div", {class: "film"}, place.times.map((time, at) => {
      const cell = place.first + at, row = Math.floor(cell / sheet.columns), column = cell % sheet.columns;
      const inside = (gold || []).some(([start, end]) => time >= start && time < end);
      return el("div", {class: `frame ${inside ? "gold" : ""}`}, el("div", {class: "picture", style: {
        width: px(sheet.width), height: px(sheet.height),
        "background-image": `url("frames/${sheet.file}")`,
        "background-size": `${px(sheet.columns * sheet.cell_width)} ${px(sheet.rows * sheet.cell_height)}`,
        "background-position": `-${px(column * sheet.cell_width)} -${px(row * sheet.cell_height)}`,
        "image-rendering": sheet.height < 64 ? "pixelated" : "auto",
      }}), clock(time));
    }));
  }

  function overview(group) {
    const frames = film(group, group.overview, group.gold);
    return frames && el("figure", {}, el("figcaption", {}, el("h3", {}, "What the prompt shows")), frames);
  }

  // --- A rollout

  paravt.views.rollout = async (query) => {
    const {step, number: place, group, groups} = await found(query);
    const at = Math.min(Number(query.get("rollout") || 0), group.rollouts.length - 1), own = group.rollouts[at];
    const kept = paravt.prefixed(paravt.unprefixed(query));
    const here = {step, group: place, rollout: at, color: query.get("color"), ...kept};
    const asked = query.get("call") === null ? Math.max(0, own.calls.findIndex((call) => call.verdict === "hit")) : Number(query.get("call"));
    const stream = new Stream(own, query.get("color") || "", (color) => history.replaceState(null, "", link("rollout", {...here, color})));
    walk(step, place, at, group.rollouts.length, groups, kept, query, stream);
    const go = (more) => link("rollout", {...here, ...more});
    return el("div", {},
      crumbs([el("a", {href: link("rollouts", {step})}, `Step ${step}`), " · ", el("a", {href: link("group", {step, group: place})}, `prompt ${place + 1}`), ` · rollout ${at + 1} of ${group.rollouts.length}`], paravt.stepName(step)),
      el("h1", {}, said(group.question)),
      el("p", {}, chips(own)),
      facts(group, [["It answered", said(own.said || "nothing")]]),
      paravt.timeline(group, own, {title: "Where it looked", href: (call) => go({call})}),
      own.calls.length ? callPanel(group, own, Math.min(asked, own.calls.length - 1), go) : el("p", {class: "soft"}, "It made no call."),
      overview(group),
      el("h2", {}, "Reward by term"), paravt.rewardBar(own.rewards),
      el("h2", {}, "What it wrote"), stream.element);
  };

  function chips(own) {
    const list = [[own.right ? "right" : "wrong", own.right ? "good" : "bad"]];
    if (own.complies != null) list.push([own.complies ? "well-formed" : "malformed", own.complies ? "" : "bad"]);
    list.push([`reward ${number(own.rewards.total)}`, ""], [`${own.calls.length} ${own.calls.length === 1 ? "call" : "calls"}`, ""]);
    if (own.stop_reasons.includes("length")) list.push(["cut off at its limit", "bad"]);
    return list.flatMap(([words, kind]) => [el("span", {class: `chip ${kind}`}, words), " "]);
  }

  function callPanel(group, own, at, go) {
    const call = own.calls[at];
    const pick = el("div", {class: "pick", role: "group", "aria-label": "Calls"}, own.calls.map((_, other) => el("button", {"aria-pressed": other === at ? "true" : "false", onclick: () => { location.replace(go({call: other})); }}, `call ${other + 1}`)));
    const figures = [
      call.window && `${clock(call.window[0])} to ${clock(call.window[1])}`,
      call.iou != null && `IoU ${number(call.iou, 2)}`, call.gold_seen != null && `sees ${percent(call.gold_seen)} of the gold window`,
      call.subagent_tokens ? `${call.subagent_tokens} tokens` : null, call.seconds ? `${number(call.seconds, 2)} s` : null,
    ].filter(Boolean).join(" · ");
    return el("div", {}, pick, el("section", {class: "call", "aria-label": `Call ${at + 1}`},
      el("header", {}, el("strong", {}, `Call ${at + 1}`), el("span", {class: `chip ${call.verdict === "hit" ? "good" : call.verdict === "invalid" ? "bad" : ""}`}, call.verdict), el("span", {class: "soft small"}, figures)),
      film(group, call.crop, group.gold),
      el("p", {class: "report"}, said(call.error || call.report || "It was shown the frames themselves.")),
      el("p", {class: "soft mono"}, said(`${call.name || "no name"}(${JSON.stringify(call.arguments)})`))));
  }

  // Arrow keys: left and right through what the filters left over, up and down through the group.
  async function walk(step, group, rollout, size, groups, kept, query, stream) {
    const to = (place) => { location.hash = link("rollout", {...place, color: stream.color, ...kept}); };
    paravt.keys = {
      ArrowDown: () => to({step, group, rollout: (rollout + 1) % size}), ArrowUp: () => to({step, group, rollout: (rollout + size - 1) % size}),
      ArrowRight: () => next(1), ArrowLeft: () => next(-1),
      g: () => { location.hash = link("group", {step, group}); },
      c: () => stream.cycle(), e: () => stream.unfold(),
    };
    async function next(by) {
      const rows = await paravt.load("index"), filters = paravt.unprefixed(query), list = paravt.matching(rows, filters);
      const now = list.findIndex((at) => rows.step[at] === step && rows.group[at] === group && rows.rollout[at] === rollout);
      const at = list[(now + by + list.length) % list.length];
      if (at !== undefined) to({step: rows.step[at], group: rows.group[at], rollout: rows.rollout[at]});
    }
  }

  // --- The stream

  const COLORS = {
    "": {words: "plain"},
    sampler: {words: "sampler log-prob", kind: "log"},
    log_probs: {words: "learner log-prob", kind: "log"},
    gap: {words: "gap", kind: "gap"},
    advantages: {words: "advantage", kind: "signed"},
    structural: {words: "structural credit", kind: "signed"},
  };
  const FOLDS = [["thought", "<think>", "</think>"], ["call", "<tool_call>", "</tool_call>"], ["call", "<grounding>", "</grounding>"], ["response", "<tool_response>", "</tool_response>"], ["answer", "<answer>", "</answer>"]];
  const TAG = /<\/?(?:think|tool_call|grounding|tool_response|answer)>/g;

  class Stream {
    constructor(own, color, told) {
      this.told = told;
      this.tokens = tokensOf(own);
      this.values = this.tokens && {...own.values, gap: own.values.log_probs?.map((value, at) => Math.abs(value - own.values.sampler[at]))};
      this.known = Object.keys(COLORS).filter((name) => !name || this.values?.[name]);
      this.color = this.known.includes(color) ? color : "";
      this.folds = foldsOf(own.text || "");
      this.body = el("div", {class: "stream"});
      this.picker = el("div", {class: "pick"});
      this.element = el("div", {}, this.picker, this.body);
      this.body.addEventListener("mouseover", (event) => this.hover(event));
      this.body.addEventListener("mouseout", () => { document.getElementById("tip").hidden = true; });
      this.draw();
    }

    cycle() { this.choose(this.known[(this.known.indexOf(this.color) + 1) % this.known.length]); }

    unfold() {
      const all = [...this.body.querySelectorAll("details")], open = all.every((one) => one.open);
      for (const one of all) one.open = !open;
    }

    choose(color) {
      this.color = color;
      this.told(color);
      this.draw();
    }

    draw() {
      const buttons = this.known.length > 1 ? this.known.map((name) => el("button", {"aria-pressed": name === this.color ? "true" : "false", "data-color": name || "plain", onclick: () => this.choose(name)}, COLORS[name].words)) : [];
      this.scale = this.scaleOf();
      this.picker.replaceChildren(...(buttons.length ? [el("span", {class: "soft small"}, "Colour tokens by"), ...buttons] : [el("span", {class: "soft small"}, "Details of tokens were not recorded for this step.")]), ...(this.scale ? [this.legend()] : []), el("button", {class: "quiet", onclick: () => this.unfold()}, "unfold all"));
      this.body.replaceChildren(...this.folds.map((fold, at) => this.fold(fold, at)));
    }

    fold(fold, at) {
      const text = fold.text, pre = el("pre", {dir: "auto"});
      const open = this.color ? fold.kind !== "turn" : fold.kind === "thought" || fold.kind === "answer";
      const details = el("details", {class: fold.kind === "response" || fold.kind === "turn" ? "given" : null, "data-kind": fold.kind},
        el("summary", {}, el("span", {class: "kind"}, fold.kind), el("span", {class: "preview model", dir: "auto"}, text.slice(0, 200).replace(/\s+/g, " ").trim()), el("span", {class: "count"}, text.length > 400 ? `${text.length.toLocaleString("en")} characters` : "")), pre);
      // What is folded costs nothing: texts may be a megabyte.
      const fill = () => { if (!pre.childNodes.length) this.fill(pre, fold); };
      details.addEventListener("toggle", () => details.open && fill());
      if (open) { details.open = true; fill(); }
      return details;
    }

    fill(pre, fold, from = 0) {
      const more = (next) => el("button", {class: "quiet", onclick: (event) => { event.target.remove(); this.fill(pre, fold, next); }}, "more");
      if (!this.tokens) {
        pre.append(fold.text.slice(from, from + MOST_TEXT), ...(from + MOST_TEXT < fold.text.length ? [more(from + MOST_TEXT)] : []));
        return;
      }
      const own = this.tokens.filter((token) => token.start < fold.end && token.start + token.text.length > fold.start);
      for (const token of own.slice(from, from + MOST_TOKENS)) pre.append(this.token(token));
      if (from + MOST_TOKENS < own.length) pre.append(more(from + MOST_TOKENS));
    }

    token(token) {
      const value = token.drawn === null || !this.color ? null : this.values[this.color][token.drawn];
      const span = el("span", {class: "t"}, token.text);
      span.token = token;
      if (value != null && this.scale) span.style.background = this.scale(value);
      return span;
    }

    scaleOf() {
      const kind = COLORS[this.color].kind, values = this.color ? this.values[this.color].filter((value) => value != null) : [];
      const most = Math.max(1e-9, ...(values.length < 1e5 ? values.map(Math.abs) : [1]));
      const wash = (color, share) => `color-mix(in srgb, ${color} ${Math.round(8 + 62 * Math.min(1, share))}%, transparent)`;
      this.most = most;
      if (kind === "log") return (value) => (value > -0.01 ? "" : wash("var(--gold)", Math.min(1, -value / 3)));
      if (kind === "gap") return (value) => (value ? wash("var(--s4)", value / most) : "");
      if (kind === "signed") return (value) => (value ? wash(value > 0 ? "var(--accent)" : "var(--bad)", Math.abs(value) / most) : "");
      return null;
    }

    legend() {
      const kind = COLORS[this.color].kind, most = number(this.most, 2);
      const [low, high, ramp] = {
        log: ["certain", "unlikely", "transparent, color-mix(in srgb, var(--gold) 70%, transparent)"],
        gap: ["0", most, "transparent, color-mix(in srgb, var(--s4) 70%, transparent)"],
        signed: [`−${most}`, `+${most}`, "color-mix(in srgb, var(--bad) 70%, transparent), transparent, color-mix(in srgb, var(--accent) 70%, transparent)"],
      }[kind];
      return el("span", {class: "legend"}, low, el("span", {class: "ramp", style: {background: `linear-gradient(90deg, ${ramp})`}}), high);
    }

    hover(event) {
      const token = event.target.token, tip = document.getElementById("tip");
      if (!token) { tip.hidden = true; return; }
      const rows = token.drawn === null ? [] : this.known.filter((name) => name).map((name) => el("tr", {}, el("th", {}, COLORS[name].words), el("td", {class: "num"}, number(this.values[name][token.drawn], 4))));
      tip.replaceChildren(el("div", {class: "mono"}, JSON.stringify(token.text)), rows.length ? el("table", {}, rows) : el("div", {class: "soft"}, "given, not generated"));
      tip.hidden = false;
      const box = event.target.getBoundingClientRect();
      tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
      tip.style.top = `${box.bottom + tip.offsetHeight + 8 < innerHeight ? box.bottom + 6 : box.top - tip.offsetHeight - 6}px`;
    }
  }

  // Tokens with where they begin in the text, and which of the generated ones they are.
  function tokensOf(own) {
    if (!own.pieces) return null;
    let start = 0, drawn = 0;
    return own.pieces.map((text, at) => {
      const token = {text, start, drawn: own.generated[at] ? drawn++ : null};
      start += text.length;
      return token;
    });
  }

  // The text in folds: thoughts, calls, responses, answers, and what stands between them.
  function foldsOf(text) {
    const folds = [], put = (kind, start, end) => {
      if (text.slice(start, end).trim()) folds.push({kind, start, end, text: text.slice(start, end)});
    };
    let done = 0, open = null;
    for (const mark of text.matchAll(TAG)) {
      const kind = FOLDS.find(([, begin, end]) => begin === mark[0] || end === mark[0]);
      if (kind[1] === mark[0] && !open) {
        put(between(text.slice(done, mark.index)), done, mark.index);
        open = {kind, at: mark.index};
        done = mark.index;
      } else if (open && kind[2] === mark[0] && open.kind === kind) {
        put(kind[0], open.at, mark.index + mark[0].length);
        open = null;
        done = mark.index + mark[0].length;
      }
    }
    put(open ? open.kind[0] : between(text.slice(done)), done, text.length);
    return folds;
  }

  const between = (text) => (/^(?:\s|<\|im_(?:start|end)\|>(?:user|assistant)?)*$/.test(text) ? "turn" : "text");
})();
