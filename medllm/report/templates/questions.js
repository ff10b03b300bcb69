"use strict";
// The browser of questions. What it shows comes from models and files: it is only ever set as text, never as markup.
(() => {
  const STEP = 200; // rows of the list that are drawn at a time
  const $ = (id) => document.getElementById(id);
  const form = $("filters"), list = $("found"), said = $("count"), view = $("question"), more = $("more");
  let book, found = [], drawn = 0, shown = null, allOpen = false, state = {};

  // --- elements -----------------------------------------------------------------------------------------------------------
  function make(tag, attributes = {}, ...children) {
    const one = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) one.setAttribute(name, value === true ? "" : value);
    }
    one.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return one;
  }

  // --- the data -----------------------------------------------------------------------------------------------------------
  async function unpack(text) {
    const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  // The texts of a question travel in a block with its neighbours', and are there once that is opened.
  const blocks = [...document.querySelectorAll("script.texts")];
  const opened = [];
  function open(at) {
    opened[at] ??= unpack(blocks[at].textContent).then((texts) => {
      texts.forEach((text, nth) => Object.assign(book.questions[at * book.block + nth], text));
    });
    return opened[at];
  }
  const blockOf = (one) => Math.floor(book.questions.indexOf(one) / book.block);

  const plain = (text) => text.normalize("NFKC").toLowerCase();

  function haystack(one) {
    one.hay ??= plain([one.id, one.text, one.context, ...(one.choices ?? []), one.category,
      ...one.answers.flatMap((answer) => [answer[0], answer[2]])].filter(Boolean).join("\n"));
    return one.hay;
  }

  // A model without and with an explanation: the places of its two cells.
  function pairs() {
    const at = (model, setting) => book.cells.findIndex((cell) => cell[0] === model && cell[1] === setting);
    return book.models.map((_, model) => {
      for (const [mine, setting] of book.cells) {
        const after = mine === model ? at(model, `${setting} with explanation`) : -1;
        if (after >= 0) return [at(model, setting), after];
      }
      return null;
    });
  }

  function fate(one, model) {
    const pair = book.pairs[model];
    if (!pair) return "";
    const [before, after] = pair.map((at) => one.right[at] === "1");
    return before ? (after ? "kept" : "lost") : after ? "gained" : "missed";
  }

  // --- the state: all of it stands in the address --------------------------------------------------------------------------
  const NAMES = ["q", "text", "year", "section", "category", "model", "flip", "cause", "answer"];

  function fromAddress() {
    const hash = location.hash.slice(1);
    if (!hash.includes("=")) return null; // an ordinary link to a section
    const given = new URLSearchParams(hash);
    return Object.fromEntries(NAMES.map((name) => [name, given.get(name) ?? ""]));
  }

  function address(changed = {}) {
    const given = new URLSearchParams();
    for (const name of NAMES) {
      const value = { ...state, ...changed }[name];
      if (value) given.set(name, value);
    }
    return `#${given}`;
  }

  function remember() {
    const now = address();
    if (now !== location.hash) history.replaceState(null, "", now.length > 1 ? now : location.pathname + location.search);
  }

  // --- which questions -----------------------------------------------------------------------------------------------------
  function matches(one, words, model) {
    for (const name of ["year", "section", "category"]) {
      if (state[name] && String(one[name] ?? "") !== state[name]) return false;
    }
    const models = model >= 0 ? [model] : book.models.keys();
    if (state.flip || state.cause) {
      const fits = [...models].some((at) => {
        const here = fate(one, at);
        const flipped = state.flip === "flipped" ? here === "lost" || here === "gained" : !state.flip || here === state.flip;
        return flipped && (!state.cause || one.flips[at]?.[1] === state.cause);
      });
      if (!fits) return false;
    }
    if (state.answer) {
      const [setting, right] = state.answer.split("|");
      const fits = book.cells.some((cell, at) => cell[1] === setting && (model < 0 || cell[0] === model)
        && one.right[at] === right);
      if (!fits) return false;
    }
    return words.every((word) => haystack(one).includes(word));
  }

  function search() {
    const words = plain(state.text).split(/\s+/).filter(Boolean);
    if (words.length && !allOpen) {
      said.textContent = "searching";
      Promise.all(blocks.map((_, at) => open(at))).then(() => { allOpen = true; search(); });
      return;
    }
    const model = book.models.indexOf(state.model);
    found = book.questions.filter((one) => matches(one, words, model));
    said.textContent = `${found.length} of ${book.questions.length} questions`;
    list.replaceChildren();
    drawn = 0;
    drawRows(STEP);
    if (!found.some((one) => one.id === state.q)) state.q = found[0]?.id ?? "";
    show();
  }

  // --- the list ------------------------------------------------------------------------------------------------------------
  function drawRows(count) {
    const model = book.models.indexOf(state.model);
    const rows = found.slice(drawn, drawn + count).map((one) => {
      const cells = [...book.cells.keys()].filter((at) => model < 0 || book.cells[at][0] === model);
      const right = cells.filter((at) => one.right[at] === "1").length;
      const link = make("a", { href: address({ q: one.id }), "data-id": one.id },
        make("b", {}, one.id), " ", make("span", { class: "begin" }, one.begin ?? ""),
        make("span", { class: "share", title: `${right} of ${cells.length} answers are right` }, `${right}/${cells.length}`,
          make("span", { class: "hidden" }, " answers right")));
      return make("li", {}, link);
    });
    list.append(...rows);
    drawn += rows.length;
    more.hidden = drawn >= found.length;
    more.textContent = `Show more (${found.length - drawn} left)`;
    mark();
  }

  function mark() {
    for (const one of list.querySelectorAll("[aria-current]")) one.removeAttribute("aria-current");
    const row = [...list.querySelectorAll("a")].find((one) => one.dataset.id === state.q);
    if (!row) return;
    row.setAttribute("aria-current", "true");
    const top = row.offsetTop - list.offsetTop;
    if (top < list.scrollTop || top + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - 40;
  }

  function step(by, inList) {
    const at = found.findIndex((one) => one.id === state.q) + by;
    if (at < 0 || at >= found.length) return;
    while (at >= drawn) drawRows(STEP);
    state.q = found[at].id;
    show();
    if (inList) list.querySelector("[aria-current]").focus({ preventScroll: true });
    else $("browser").scrollIntoView({ block: "nearest" });
    $("now").textContent = `${state.q}, ${at + 1} of ${found.length}`;
  }

  // --- one question --------------------------------------------------------------------------------------------------------
  function show() {
    const one = found.find((other) => other.id === state.q);
    mark();
    remember();
    if (one && !one.answers) {
      open(blockOf(one)).then(show);
      return;
    }
    if (one && one === shown?.one && state.model === shown.model && found.length === shown.of) return;
    shown = one && { one, model: state.model, of: found.length };
    view.replaceChildren(...(one ? parts(one) : [make("p", {}, "No question is as the filters want it.")]));
  }

  function parts(one) {
    const place = found.indexOf(one) + 1;
    const facts = [one.year, one.section && `section ${one.section}`, one.category,
      one.points > 1 && `${one.points} points`, one.image && "needs an image that is not in the text"].filter(Boolean);
    const head = make("header", {}, make("h3", { id: "asked" }, one.id),
      make("p", { class: "note" }, [`${place} of ${found.length}`, ...facts].join(" · "), " · ",
        make("a", { href: address() }, "link to this question")));
    if (one.text === undefined) {
      return [head, make("p", { class: "note" }, "The problem file is not at hand, so the question is not shown."), answers(one)];
    }
    const context = one.context && make("details", {}, make("summary", {}, "What the question is about"),
      make("p", { class: "text" }, one.context));
    return [head, context || "", make("p", { class: "text" }, one.text), choices(one), ...prompts(one), answers(one)].filter(Boolean);
  }

  const letters = (answer) => answer.split(",").map((letter) => letter.trim());

  function choices(one) {
    if (!one.choices.length) return make("p", {}, "Right answer: ", make("b", {}, one.gold.map((way) => way.join(",")).join(" or ")));
    const gold = new Set(one.gold.flat());
    const rows = one.choices.map((choice, at) => {
      const letter = String.fromCharCode(97 + at), right = gold.has(letter);
      const chosen = one.answers.filter((answer) => letters(answer[0]).includes(letter)).length;
      return make("li", { class: right ? "gold" : null }, make("b", {}, `${letter} `), choice,
        right ? make("span", { class: "tag" }, "right answer") : "",
        make("span", { class: "share", title: "answers that name it" }, `${chosen}`, make("span", { class: "hidden" }, " answers name it")));
    });
    return make("ol", { class: "options", "aria-label": "Options" }, ...rows);
  }

  function prompts(one) {
    return one.asked.map((asked, form) => {
      const settings = new Set(book.cells.filter((cell) => cell[2] === form).map((cell) => cell[1]));
      const details = make("details", { class: "prompt" }, make("summary", {}, `Prompt: ${[...settings].join(", ")}`));
      details.addEventListener("toggle", () => {
        if (details.open && details.children.length === 1) {
          details.append(make("pre", {}, make("span", { class: "before" }, book.forms[form]), asked));
        }
      });
      return details;
    });
  }

  function answers(one) {
    const chosen = book.models.indexOf(state.model);
    const order = [...book.models.keys()].sort((a, b) => (b === chosen) - (a === chosen) || a - b);
    return make("div", { class: "responses" }, ...order.map((model) => {
      const cells = [...book.cells.keys()].filter((at) => book.cells[at][0] === model);
      const flip = one.flips[model];
      const why = flip && make("p", { class: "flip" }, flip[0]
        ? `Lost by explaining: the text ${book.words.causes[flip[1]]}.`
        : `Gained by explaining: without, the text ${book.words.causes[flip[1]]}.`);
      return make("section", { class: model === chosen ? "model chosen" : "model", "aria-label": book.models[model] },
        make("h4", {}, book.models[model]), why || "", ...cells.map((at) => answer(one, at)));
    }));
  }

  function answer(one, at) {
    const [prediction, read, text] = one.answers[at], right = one.right[at] === "1";
    const options = prediction && one.choices?.length
      ? letters(prediction).map((letter) => one.choices[letter.charCodeAt(0) - 97]).filter(Boolean).join(", ") : "";
    const how = book.words.read[read] ? `read by ${read}: ${book.words.read[read]}`
      : book.words.unread[read] ? `not read: ${book.words.unread[read]}` : "how it was read is not known";
    return make("div", { class: `response ${right ? "right" : "wrong"}` },
      make("p", {}, make("span", { class: "mark" }, right ? "✓ right" : "✗ wrong"), ` · ${book.cells[at][1]}`),
      make("p", {}, prediction ? make("b", {}, prediction) : "no answer", options && ` ${options}`),
      text ? make("p", { class: "text" }, text) : "",
      make("p", { class: "note" }, how));
  }

  // --- the filters ---------------------------------------------------------------------------------------------------------
  function fill(name, values, words = (value) => value) {
    const select = form.elements[name];
    for (const value of values) select.append(make("option", { value }, words(value)));
    select.closest("label").hidden = values.length === 0 || (values.length === 1 && name !== "model");
  }

  function fillAll() {
    const values = (name) => [...new Set(book.questions.map((one) => one[name]).filter((value) => value ?? false))].map(String).sort();
    for (const name of ["year", "section", "category"]) fill(name, values(name));
    fill("model", book.models);
    const causes = new Set(book.questions.flatMap((one) => Object.values(one.flips).map((flip) => flip[1])));
    fill("cause", Object.keys(book.words.causes).filter((cause) => causes.has(cause)), (cause) => book.words.causes[cause]);
    const settings = [...new Set(book.cells.map((cell) => cell[1]))];
    fill("answer", settings.flatMap((setting) => [`${setting}|1`, `${setting}|0`]),
      (value) => `${value.endsWith("1") ? "right" : "wrong"}, ${value.split("|")[0]}`);
    form.elements.flip.closest("label").hidden = !book.pairs.some(Boolean);
  }

  function toForm() {
    for (const name of NAMES.slice(1)) form.elements[name].value = state[name];
  }

  function go(next) {
    state = { ...Object.fromEntries(NAMES.map((name) => [name, ""])), ...next };
    toForm();
    for (const name of NAMES.slice(1)) state[name] = form.elements[name].value; // what no option says is no filter
    search();
  }

  // --- what a reader does --------------------------------------------------------------------------------------------------
  let waiting;
  form.addEventListener("input", (event) => {
    if (event.target.name === "keys") return;
    clearTimeout(waiting);
    waiting = setTimeout(() => go({ ...Object.fromEntries(new FormData(form)), q: state.q }), event.target.name === "text" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => go({ q: state.q })));
  more.addEventListener("click", () => drawRows(STEP));
  list.addEventListener("click", (event) => {
    const row = event.target.closest("a");
    if (!row || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    state.q = row.dataset.id;
    show();
    view.focus({ preventScroll: true });
    view.scrollIntoView({ block: "nearest" });
  });
  addEventListener("hashchange", () => {
    const next = fromAddress();
    if (!next) return;
    go(next);
    $("questions").scrollIntoView();
    view.focus({ preventScroll: true });
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, select, textarea");
    if (event.key === "Escape" && typing) return view.focus();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !form.elements.keys.checked) return;
    const inList = list.contains(event.target); // elsewhere arrows scroll, as they do everywhere
    const by = { j: 1, k: -1, ...(inList ? { ArrowDown: 1, ArrowUp: -1 } : {}) }[event.key];
    if (by) step(by, inList);
    else if (event.key === "/") form.elements.text.focus();
    else return;
    event.preventDefault();
  });

  // Whoever reads will search: while nothing else is to do, the blocks are opened one after the other.
  function openAhead(at) {
    if (at < blocks.length) (window.requestIdleCallback ?? setTimeout)(() => open(at).then(() => openAhead(at + 1)));
  }

  async function start() {
    $("loading").hidden = false;
    book = await unpack($("data").textContent);
    book.pairs = pairs();
    fillAll();
    $("browser").hidden = false;
    $("loading").hidden = true;
    const wanted = fromAddress();
    go(wanted ?? {});
    if (found.length) await open(blockOf(found.find((one) => one.id === state.q)));
    if (wanted) $("questions").scrollIntoView();
    openAhead(0);
    document.documentElement.dataset.ready = Math.round(performance.now());
  }
  start().catch((error) => { $("loading").textContent = `The questions cannot be shown: ${error.message}`; });
})();
