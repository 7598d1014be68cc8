// The group explorer: a list of images, and one image with its candidates. Data come from script files beside the page,
// each one call of dp2osr(name, data); text enters the page as text nodes only.
"use strict";

(() => {
  const KEPT_PAGES = 3; // data files of groups in memory
  const LARGE = 300; // pixels of the large images at most
  const CARD = 104; // pixels of a candidate's picture
  const find = (id) => document.getElementById(id);

  // ---------------------------------------------------------------- data files

  const arrived = new Map();
  window.dp2osr = (name, data) => arrived.set(name, data);

  function load(path, name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = path;
      script.onload = () => {
        const data = arrived.get(name);
        arrived.delete(name);
        script.remove();
        if (data === undefined) reject(new Error(`${path} holds no ${name}: make it again`));
        else resolve(data);
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`${path} was not found beside this page`));
      };
      document.head.append(script);
    });
  }

  /** Remembers the last `size` results of an asynchronous `make`, by key; `drop` is called on what is forgotten. */
  function remember(size, make, drop = () => {}) {
    const kept = new Map();
    return (key) => {
      const found = kept.get(key) ?? make(key);
      kept.delete(key);
      kept.set(key, found);
      found.catch(() => kept.delete(key));
      if (kept.size > size) {
        const [oldest, value] = kept.entries().next().value;
        kept.delete(oldest);
        value.then(drop, () => {});
      }
      return found;
    };
  }

  const pageOf = remember(KEPT_PAGES, (key) => load(`data/${key}.js`, key));
  const iconsOf = remember(
    500,
    (key) => load(`data/${key}/small.js`, `${key}/small`).then(opened),
    (icons) => URL.revokeObjectURL(icons.url),
  );

  /** A sprite sheet with an address for its image, which must be revoked. */
  function opened(sprite) {
    const bytes = Uint8Array.from(atob(sprite.webp), (char) => char.charCodeAt(0));
    return { ...sprite, webp: "", url: URL.createObjectURL(new Blob([bytes], { type: "image/webp" })) };
  }

  // ---------------------------------------------------------------- elements

  /** An element; properties that begin with `on` are listeners, the others attributes. */
  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== false && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  /** One tile of a sprite sheet as an element of some width. */
  function picture(sprite, tile, width, label) {
    const height = Math.round((width * sprite.height) / sprite.width);
    const node = make("div", { class: "image", role: "img", "aria-label": label });
    node.style.width = `${width}px`;
    node.style.height = `${height}px`;
    if (sprite.missing.includes(tile)) {
      node.classList.add("none");
      node.textContent = "no image";
      return node;
    }
    const [column, row] = [tile % sprite.columns, Math.floor(tile / sprite.columns)];
    const rows = Math.ceil(sprite.tiles / sprite.columns);
    node.style.backgroundImage = `url("${sprite.url}")`;
    node.style.backgroundSize = `${sprite.columns * width}px ${rows * height}px`;
    node.style.backgroundPosition = `${-column * width}px ${-row * height}px`;
    return node;
  }

  function number(value, digits) {
    if (value === null || value === undefined) return "–";
    return value.toFixed(digits ?? (Math.abs(value) >= 10 ? 2 : 4)).replace("-", "−");
  }

  // ---------------------------------------------------------------- the list of images

  let data; // index.js
  let order = []; // positions of the groups found
  let first = 0; // of `order`, on the page of the list
  let texts = []; // id and source of each group in lower case

  function matches(at, query, filter, limit) {
    const { fr_over_nr: fr, nr_over_fr: nr, rho } = data.groups;
    if (query && !texts[at].includes(query)) return false;
    if (filter === "either") return Math.max(fr[at] ?? -2, nr[at] ?? -2) >= limit;
    if (filter === "rho") return rho[at] !== null && rho[at] <= limit;
    return !filter || (data.groups[filter][at] !== null && data.groups[filter][at] >= limit);
  }

  function compare(by) {
    const values = data.groups[by];
    if (by === "id") return (a, b) => (values[a] < values[b] ? -1 : values[a] > values[b] ? 1 : a - b);
    const sign = by === "rho" ? 1 : -1;
    const last = (at) => (values[at] === null ? Infinity : sign * values[at]);
    return (a, b) => last(a) - last(b) || a - b;
  }

  function search() {
    const query = find("search").value.trim().toLowerCase();
    const filter = find("filter").value;
    const limit = Number(find("limit").value);
    const by = find("order").value;
    order = [];
    for (let at = 0; at < texts.length; at++) if (matches(at, query, filter, limit)) order.push(at);
    if (by) order.sort(compare(by));
    find("limit").disabled = !filter;
    turn(0);
  }

  const size = () => Number(find("size").value);

  function turn(to) {
    first = Math.min(Math.max(to, 0), Math.max(order.length - 1, 0));
    const shown = order.slice(first, first + size());
    find("list").replaceChildren(...shown.map(row));
    find("list").scrollTop = 0;
    find("back").disabled = first === 0;
    find("next").disabled = first + size() >= order.length;
    const ends = shown.length ? `${first + 1}–${first + shown.length} of ` : "";
    const [found, all] = [order.length, texts.length].map((count) => count.toLocaleString("en"));
    find("where").textContent = `${ends}${found} found of ${all}`;
  }

  function row(at) {
    const groups = data.groups;
    const icon = make("span", { class: "image icon" });
    const shard = `shard-${groups.shard[at]}`;
    const place = groups.place[at];
    const arrive = (icons) => {
      const found = picture(icons, place, 48, "");
      found.classList.add("icon");
      icon.replaceWith(found);
    };
    iconsOf(shard).then(arrive, () => {}); // a row without its picture still says which image it is
    const facts = [
      `std ${number(groups.spread[at], 3)}`,
      `FR−NR ${number(groups.fr_over_nr[at], 2)}`,
      `NR−FR ${number(groups.nr_over_fr[at], 2)}`,
      `ρ ${number(groups.rho[at], 2)}`,
    ].join(" · ");
    const name = groups.source[at] || groups.id[at];
    return make(
      "li",
      {},
      make(
        "button",
        {
          type: "button",
          "data-at": at,
          "aria-current": String(at === current),
          title: `${name} ${groups.id[at]}`,
          onclick: () => open(at),
        },
        icon,
        make("span", { class: "name" }, name),
        make("span", { class: "facts" }, facts),
      ),
    );
  }

  // ---------------------------------------------------------------- one image

  let current = -1; // position of the group shown
  let shown; // { group, sprite, order, selected, best }
  let sorting = { by: "reward", down: true };

  const open = (at) => (location.hash = `#${encodeURIComponent(data.groups.id[at])}`);

  function notice(text) {
    find("group").replaceChildren(make("p", { id: "notice", class: "soft", role: "status" }, text));
  }

  async function show(at) {
    current = at;
    for (const button of find("list").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(Number(button.dataset.at) === at));
    }
    const groups = data.groups;
    const key = `shard-${groups.shard[at]}/page-${String(groups.page[at]).padStart(3, "0")}`;
    notice(`Loading ${key} …`);
    let group;
    try {
      group = (await pageOf(key)).groups[groups.at[at]];
    } catch (error) {
      notice(`${error.message}.`);
      return;
    }
    if (current !== at) return; // another image was opened meanwhile
    if (shown) URL.revokeObjectURL(shown.sprite.url);
    const best = group.rank.indexOf(0);
    const worst = group.rank.indexOf(Math.max(...group.rank));
    shown = { at, group, sprite: opened(group.sprite), selected: worst, best };
    draw();
    find("group").scrollTop = 0;
  }

  /** winner, loser, both or nothing: what the run that is chosen makes of a candidate. */
  function mark(candidate) {
    const run = data.runs[find("run")?.value];
    if (!run) return "";
    const rollout = shown.group.rollout[candidate];
    const [won, lost] = [run.chosen[shown.at].includes(rollout), run.rejected[shown.at].includes(rollout)];
    return won && lost ? "both" : won ? "winner" : lost ? "loser" : "";
  }

  function value(candidate, by) {
    const group = shown.group;
    const [fr, nr] = [group.fr[candidate], group.nr[candidate]];
    if (by === "fr_over_nr" || by === "nr_over_fr") {
      if (fr === null || nr === null) return null;
      return by === "fr_over_nr" ? fr - nr : nr - fr;
    }
    const metric = data.metrics.findIndex((each) => each.name === by);
    return metric >= 0 ? group.norm[metric][candidate] : group[by][candidate];
  }

  function sorted() {
    const side = find("side")?.value ?? "";
    const all = shown.group.rollout.map((_, candidate) => candidate);
    const kept = side ? all.filter((candidate) => ["both", side].includes(mark(candidate))) : all;
    const sign = sorting.down ? -1 : 1;
    const last = (candidate) => {
      const found = value(candidate, sorting.by);
      return found === null || (sorting.by === "rank" && found < 0) ? Infinity : sign * found;
    };
    return kept.sort((a, b) => last(a) - last(b) || shown.group.rollout[a] - shown.group.rollout[b]);
  }

  const ORDERS = [
    ["reward", "reward"],
    ["fr", "FR part"],
    ["nr", "NR part"],
    ["fr_over_nr", "FR − NR: FR likes, NR does not"],
    ["nr_over_fr", "NR − FR: NR likes, FR does not"],
    ["rollout", "rollout (seed)"],
  ];
  const SIDES = [["", "all candidates"], ["winner", "winners"], ["loser", "losers"]];

  function select(id, label, options, chosen, onchange) {
    const option = ([name, text]) => make("option", { value: name, selected: name === chosen ? "" : false }, text);
    const nodes = options.map(option);
    return make("label", {}, label, make("select", { id, onchange }, ...nodes));
  }

  const NOTE =
    "Raw, and below it normalised within the group: 0 is the group's worst, 1 its best, whatever the metric's " +
    "direction. Metrics in italics are held out of the reward.";

  function draw() {
    const { group } = shown;
    const groups = data.groups;
    const runs = Object.keys(data.runs);
    const run = find("run")?.value ?? runs[0] ?? "";
    const side = find("side")?.value ?? "";
    const metrics = data.metrics.map((each) => [each.name, `${each.name} ${each.arrow}, best first`]);
    const tools = make("div", { class: "tools" });
    const by = [...ORDERS, ...metrics];
    tools.append(select("by", "sort candidates by", by, sorting.by, (event) => sort(event.target.value)));
    if (runs.length) {
      const named = runs.map((name) => [name, name]);
      tools.append(select("run", "winners and losers of run", named, run, refresh));
      tools.append(select("side", "show", SIDES, side, refresh));
    }
    const missing = groups.missing[shown.at];
    const facts = [
      group.id,
      `${group.rollout.length} candidates`,
      `std of the reward ${number(groups.spread[shown.at], 3)}`,
      `rank correlation of FR and NR ${number(groups.rho[shown.at], 2)}`,
      ...(missing ? [`${missing} without a reward`] : []),
    ].join(" · ");
    find("group").replaceChildren(
      make("h2", {}, groups.source[shown.at] || group.id),
      make("p", { class: "note" }, facts),
      make("div", { class: "large", id: "large" }),
      tools,
      make("div", { class: "cards", id: "cards", role: "group", "aria-label": "Candidates; arrow keys move" }),
      make("h3", {}, "Scores"),
      make("p", { class: "note" }, NOTE),
      make("div", { class: "scroll" }, make("table", { class: "numbers", id: "numbers" })),
    );
    refresh();
  }

  function refresh() {
    shown.order = sorted();
    drawLarge();
    find("cards").replaceChildren(...shown.order.map(card));
    find("numbers").replaceChildren(...tableOf());
  }

  function sort(by) {
    sorting = { by, down: by !== "rollout" && by !== "rank" };
    find("by").value = by;
    refresh();
  }

  function choose(candidate) {
    shown.selected = candidate;
    drawLarge();
    for (const node of document.querySelectorAll("[data-candidate]")) {
      const state = node.tagName === "TR" ? "aria-selected" : "aria-pressed";
      node.setAttribute(state, String(Number(node.dataset.candidate) === candidate));
    }
  }

  function said(candidate) {
    const { rollout, rank, reward } = shown.group;
    const ranked = rank[candidate] < 0 ? "no rank" : `rank ${rank[candidate]}`;
    return `seed ${rollout[candidate]}, ${ranked}, reward ${number(reward[candidate], 3)}`;
  }

  function drawLarge() {
    const { sprite, best, selected } = shown;
    const tiles = [["LR", "what the model was given", 0], ["HR", sprite.missing.includes(1) ? "none" : "the original", 1]];
    if (best >= 0) tiles.push(["best", said(best), 2 + best]);
    tiles.push(["selected", said(selected), 2 + selected]);
    const width = find("large").clientWidth;
    const columns = width < 700 ? 2 : 4;
    const side = Math.min(LARGE, Math.floor(width / columns) - 12);
    const figure = ([title, note, tile]) => {
      const caption = make("figcaption", {}, make("b", {}, title), ` ${note}`);
      return make("figure", {}, picture(sprite, tile, side, `${title}: ${note}`), caption);
    };
    find("large").replaceChildren(...tiles.map(figure));
  }

  function scale(kind, value) {
    const bar = make("i");
    bar.style.backgroundSize = `${100 * Math.min(Math.max(value ?? 0, 0), 1)}% 100%`;
    return make("div", { class: `scale ${kind}` }, kind.toUpperCase(), bar);
  }

  /** A line of a card: something at either end. */
  const line = (left, right) => make("div", { class: "line" }, make("span", {}, left), make("span", {}, right));

  const WORDS = { winner: "▲ winner", loser: "▼ loser", both: "▲▼ both", "": "" };

  function card(candidate) {
    const { group, sprite } = shown;
    const side = mark(candidate);
    const rank = group.rank[candidate];
    const parts = [said(candidate), `FR ${number(group.fr[candidate], 2)}`, `NR ${number(group.nr[candidate], 2)}`];
    const label = [...parts, ...(side ? [side] : [])].join(", ");
    const place = `seed ${group.rollout[candidate]}`;
    return make(
      "button",
      {
        type: "button",
        class: `card ${side}`,
        "data-candidate": candidate,
        "aria-pressed": String(candidate === shown.selected),
        "aria-label": label,
        title: group.status[group.rollout[candidate]] ?? label,
        onclick: () => choose(candidate),
      },
      picture(sprite, 2 + candidate, CARD, ""),
      line(make("b", {}, number(group.reward[candidate], 3)), rank < 0 ? "no reward" : `rank ${rank}`),
      line(place, make("span", { class: `mark ${side}` }, WORDS[side])),
      scale("fr", group.fr[candidate]),
      scale("nr", group.nr[candidate]),
    );
  }

  /** A head that sorts: metrics by their normalised score, so that the best comes first whatever their direction. */
  function head(by, text, metric) {
    const active = sorting.by === by;
    const falling = sorting.down !== (metric?.arrow === "↓"); // of the raw scores that are shown
    const direction = active ? (falling ? "descending" : "ascending") : undefined;
    const again = () => {
      if (active) sorting.down = !sorting.down;
      else sorting = { by, down: by !== "rank" && by !== "rollout" };
      if ([...find("by").options].some((option) => option.value === by)) find("by").value = by;
      refresh();
      find(`head-${by}`).focus();
    };
    const arrow = active ? (falling ? " ▾" : " ▴") : "";
    const out = metric && !metric.in_reward;
    const properties = { type: "button", id: `head-${by}`, class: out ? "out" : "", onclick: again };
    return make("th", { scope: "col", "aria-sort": direction }, make("button", properties, text + arrow));
  }

  function tableOf() {
    const { group } = shown;
    const heads = [head("rollout", "seed"), head("rank", "rank"), make("th", { class: "left" }, "pair")];
    heads.push(head("reward", "reward"), head("fr", "FR"), head("nr", "NR"));
    heads.push(...data.metrics.map((each) => head(each.name, `${each.name} ${each.arrow}`, each)));
    const rows = shown.order.map((candidate) => {
      const side = mark(candidate);
      const rank = group.rank[candidate];
      const cells = [String(group.rollout[candidate]), rank < 0 ? "–" : String(rank)];
      const score = (_, at) => {
        const norm = make("small", {}, number(group.norm[at][candidate], 3));
        return make("td", {}, number(group.raw[at][candidate]), norm);
      };
      const scores = data.metrics.map(score);
      const selected = String(candidate === shown.selected);
      return make(
        "tr",
        { "data-candidate": candidate, "aria-selected": selected, onclick: () => choose(candidate) },
        ...cells.map((text) => make("td", {}, text)),
        make("td", { class: `left mark ${side}` }, WORDS[side]),
        ...["reward", "fr", "nr"].map((name) => make("td", {}, number(group[name][candidate], 4))),
        ...scores,
      );
    });
    return [make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)];
  }

  // ---------------------------------------------------------------- keys, and the beginning

  /** Move the focus among the buttons of a container with the arrow keys. */
  function arrows(event, selector, steps) {
    const step = steps[event.key];
    const buttons = [...event.currentTarget.querySelectorAll(selector)];
    const at = buttons.indexOf(document.activeElement);
    if (step === undefined || at < 0) return;
    event.preventDefault();
    buttons[Math.min(Math.max(at + step, 0), buttons.length - 1)].focus();
  }

  function fromAddress() {
    const id = decodeURIComponent(location.hash.slice(1));
    const at = id ? data.groups.id.indexOf(id) : order[0] ?? -1;
    if (at >= 0) return show(at);
    notice(id ? `No image has the id ${id}.` : "There is no image here.");
  }

  async function begin() {
    try {
      data = await load("index.js", "index");
    } catch (error) {
      notice(`${error.message}.`);
      return;
    }
    const groups = data.groups;
    texts = groups.id.map((id, at) => `${id} ${groups.source[at]}`.toLowerCase());
    const counts = new Map(); // the place of each group in its shard's sheet of small pictures
    groups.place = groups.shard.map((shard) => counts.set(shard, (counts.get(shard) ?? -1) + 1).get(shard));
    for (const id of ["search", "filter", "limit", "order"]) find(id).addEventListener("input", search);
    find("size").addEventListener("input", () => turn(first));
    find("filters").addEventListener("submit", (event) => event.preventDefault());
    find("back").addEventListener("click", () => turn(first - size()));
    find("next").addEventListener("click", () => turn(first + size()));
    find("list").addEventListener("keydown", (event) => arrows(event, "button", { ArrowDown: 1, ArrowUp: -1 }));
    find("group").addEventListener("keydown", (event) => arrows(event, ".card", { ArrowRight: 1, ArrowLeft: -1 }));
    window.addEventListener("hashchange", fromAddress);
    search();
    fromAddress();
  }

  begin();
})();
