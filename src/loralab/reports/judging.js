// The voting page's program: shows one pair at a time and keeps every vote, on a server or in this browser.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const given = JSON.parse(byId("given").textContent);
  const pairs = new Map(given.pairs.map((pair) => [pair.item, pair]));
  const CHOICES = { left: "A is better", right: "B is better", tie: "about the same", both_bad: "both bad" };
  // Two quick presses are one; a pair has to be seen before it is judged.
  const SETTLE_MS = 250;
  const LONGEST_SECONDS = 24 * 3600;
  const WORD = /[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]\s*|(?:(?![\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])[\p{L}\p{M}\p{N}_])+\s*|[^]\s*/gu;
  const MOST_COMPARED = 4e6;

  // --- small things -------------------------------------------------------------------------------------------------

  function make(tag, fields, ...children) {
    const element = Object.assign(document.createElement(tag), fields);
    element.append(...children);
    return element;
  }
  const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;
  const button = (words, action, main) => make("button", { type: "button", className: main ? "main" : "", onclick: action }, words);

  // Storage may be off or full; then `false` and `null` say so.
  function keep(storage, key, value) {
    try { window[storage].setItem(key, JSON.stringify(value)); return true; } catch { return false; }
  }
  function kept(storage, key) {
    try { return JSON.parse(window[storage].getItem(key)); } catch { return null; }
  }

  // --- votes ----------------------------------------------------------------------------------------------------------
  // Both kinds: answers() gives item -> choice, act() takes a vote (choice null: taken back), words() says where they are.

  function onServer() {
    const key = `judging-waiting:${location.pathname}`;
    const saved = kept("sessionStorage", key);
    let answers = given.answers;
    let closed = given.closed;
    let waiting = (Array.isArray(saved) ? saved : []).filter((act) => pairs.has(act.item));
    let problem = ""; // why votes wait
    let refusal = ""; // why one was not taken
    let sending = null;
    let failures = 0;
    let timer = 0;
    let leaving = false;
    const others = "BroadcastChannel" in window ? new BroadcastChannel(key) : null;
    if (others) others.onmessage = (event) => (event.data === "closed" ? elsewhere() : look());
    addEventListener("pagehide", () => { leaving = true; });
    addEventListener("pageshow", () => { leaving = false; });
    addEventListener("online", () => { look(); });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
    setInterval(() => { if (!document.hidden && !sending && !timer && !closed) look(); }, 3000);

    async function ask(path, value) {
      const options = { signal: AbortSignal.timeout(10000), redirect: "error" };
      if (value) Object.assign(options, { method: "POST", body: JSON.stringify(value), headers: { "Content-Type": "application/json" } });
      const reply = await fetch(path, options);
      if (!reply.ok) throw Object.assign(new Error(await reply.text()), { status: reply.status });
      return reply.json();
    }
    function learn(state) {
      answers = state.answers;
      failures = 0;
      problem = "";
      if (state.closed && !closed) elsewhere();
    }
    function elsewhere() {
      closed = true;
      waiting = [];
      keep("sessionStorage", key, waiting);
      showWords("This sitting is finished", ["It was finished elsewhere. The command shows the result."]);
    }
    function lost(error) {
      if (leaving) return;
      failures += 1;
      const why = error.status ? `loralab answered: ${error.message}` : "No connection to loralab.";
      const waits = waiting.length
        ? ` ${count(waiting.length, "vote is", "votes are")} kept here and sent again until it answers. Do not close this tab.`
        : " Your votes so far are saved.";
      problem = `${why}${waits} If the command has ended, start it again and open the address that it prints.`;
      clearTimeout(timer);
      timer = setTimeout(look, Math.min(1000 * 2 ** (failures - 1), 5000));
      refresh();
    }
    // Waiting votes go out in their order; without any, the state is asked for.
    function look() {
      sending ||= run().finally(() => {
        sending = null;
        if (waiting.length && !timer && !leaving) look();
      });
      return sending;
    }
    async function run() {
      clearTimeout(timer);
      timer = 0;
      try {
        if (!waiting.length) learn(await ask("state"));
        while (waiting.length) {
          const [act] = waiting;
          try {
            learn(await ask("votes", act));
          } catch (error) {
            if (error.status !== 400 && error.status !== 409) throw error;
            refusal = `Your last vote was not taken. ${error.message}`;
            learn(await ask("state"));
          }
          if (waiting[0] === act) waiting.shift();
          keep("sessionStorage", key, waiting);
          if (others) others.postMessage("voted");
        }
        refresh();
      } catch (error) {
        lost(error);
      }
    }
    return {
      answers() {
        const now = new Map(Object.entries(answers).filter(([item]) => pairs.has(item)));
        for (const { item, choice } of waiting) choice === null ? now.delete(item) : now.set(item, choice);
        return now;
      },
      act(item, choice, seconds) {
        refusal = "";
        waiting.push({ item, choice, seconds });
        keep("sessionStorage", key, waiting);
        look();
      },
      retry: look,
      problem: () => problem || refusal,
      retries: () => Boolean(problem),
      closed: () => closed,
      unsafe: () => waiting.length > 0,
      words: () => (waiting.length ? (problem ? `${count(waiting.length, "vote", "votes")} not saved yet` : "Saving …") : "Saved"),
      async finish() {
        await look();
        if (waiting.length || problem || closed) return null;
        closed = true; // so that a look at the state does not take it for somebody else's doing
        try {
          const state = await ask("close", {});
          if (others) others.postMessage("closed");
          return state;
        } catch (error) {
          closed = false;
          lost(error);
          return null;
        }
      },
    };
  }

  function inBrowser() {
    const key = `judging:${given.items_sha256}:${given.rater}`;
    const memory = { acts: [], closed: false };
    let durable = true;
    // Another tab may have written since, so what is kept is read before every act.
    function read() {
      const value = durable ? kept("localStorage", key) : null;
      return value && Array.isArray(value.acts) ? value : memory;
    }
    function write(value) {
      Object.assign(memory, value);
      durable = keep("localStorage", key, value);
      refresh();
    }
    durable = keep("localStorage", `${key}:probe`, 0);
    addEventListener("storage", (event) => { if (event.key === key || event.key === null) refresh(); });
    return {
      answers() {
        const now = new Map();
        for (const { item, choice } of read().acts) {
          if (!pairs.has(item)) continue;
          choice === null ? now.delete(item) : now.set(item, choice);
        }
        return now;
      },
      act(item, choice, seconds) {
        const value = read();
        write({ acts: [...value.acts, { item, choice, seconds, at: new Date().toISOString() }], closed: value.closed });
      },
      problem: () => (durable ? "" : "This browser does not keep votes for this page: save them to a file before you close it."),
      retries: () => false,
      closed: () => read().closed === true,
      unsafe: () => !durable && memory.acts.length > 0,
      words: () => (durable ? "Kept in this browser" : "Not kept"),
      file(closed) {
        const { acts } = read();
        write({ acts, closed });
        return JSON.stringify({ loralab_votes: given.version, items_sha256: given.items_sha256, rater: given.rater, acts, closed }, null, 1);
      },
      reopen: () => write({ acts: read().acts, closed: false }),
    };
  }

  // --- where the rater is ---------------------------------------------------------------------------------------------

  const live = given.mode === "live";
  const viewKey = `judging-view:${live ? location.pathname : `${given.items_sha256}:${given.rater}`}`;
  const view = { order: [...pairs.keys()], at: -1, spent: {}, mono: false, marks: false };
  const before = kept("sessionStorage", viewKey);
  if (before && Array.isArray(before.order) && [...before.order].sort().join() === [...pairs.keys()].sort().join()) Object.assign(view, before);

  let clock = null; // since when the pair is looked at; null while nobody does
  let shownAt = 0;
  let shownItem = null;
  let over = false; // the end is shown for good

  const item = () => view.order[view.at];
  function stopClock() {
    if (clock !== null && item()) view.spent[item()] = (view.spent[item()] || 0) + (performance.now() - clock) / 1000;
    clock = null;
  }
  function startClock() {
    clock = document.hidden || !item() || over ? null : performance.now();
  }
  function nextOpen(from) {
    const answers = votes.answers();
    const { order } = view;
    for (let step = 1; step <= order.length; step += 1) {
      const at = (from + step + order.length) % order.length;
      if (!answers.has(order[at])) return at;
    }
    return order.length;
  }
  function go(at) {
    stopClock();
    view.at = Math.max(0, Math.min(at, view.order.length));
    keep("sessionStorage", viewKey, view);
    refresh();
    startClock();
  }
  function say(words) { byId("status").textContent = words; }

  // --- what the rater does --------------------------------------------------------------------------------------------

  function choose(choice) {
    if (!item() || performance.now() - shownAt < SETTLE_MS) return;
    stopClock();
    const seconds = Math.round((view.spent[item()] || 0) * 10) / 10;
    const place = view.at + 1;
    votes.act(item(), choice, seconds <= LONGEST_SECONDS ? seconds : null);
    go(nextOpen(view.at));
    say(`Pair ${place}: ${CHOICES[choice]}`);
  }
  function back() { if (view.at > 0) { go(view.at - 1); say(""); } }
  function forward() {
    if (!item() || !votes.answers().has(item())) return;
    go(view.at + 1 < view.order.length ? view.at + 1 : nextOpen(view.at));
    say("");
  }
  function skip() {
    if (!item()) return;
    if (votes.answers().has(item())) { forward(); return; }
    stopClock();
    view.order.push(...view.order.splice(view.at, 1));
    const next = nextOpen(view.at - 1);
    if (view.order[next] === shownItem) say("No other pair is left to judge");
    else say("Skipped; it comes again at the end");
    go(next);
  }
  function withdraw() {
    if (!item()) return;
    votes.act(item(), null, null);
    refresh();
    say("Your vote on this pair is taken back");
  }
  function toggle(name) { view[name] = !view[name]; keep("sessionStorage", viewKey, view); shownItem = null; refresh(); }

  // --- the pair -------------------------------------------------------------------------------------------------------

  function fill(box, text, pieces) {
    if (!text.trim()) box.replaceChildren(make("span", { className: "empty" }, text ? "only blanks" : "empty"));
    else if (!pieces) box.textContent = text;
    else box.replaceChildren(...pieces.map(([words, differs]) => (differs ? make("mark", {}, words) : words)));
    box.scrollTop = 0;
  }
  // Longest common subsequence of words; null where both are too long for it.
  function differences(left, right) {
    const [a, b] = [left.match(WORD) || [], right.match(WORD) || []];
    let start = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
    let [m, n] = [a.length, b.length];
    while (m > start && n > start && a[m - 1] === b[n - 1]) { m -= 1; n -= 1; }
    const [rows, columns] = [m - start, n - start];
    if ((rows + 1) * (columns + 1) > MOST_COMPARED) return null;
    const longest = new Uint16Array((rows + 1) * (columns + 1));
    const at = (i, j) => i * (columns + 1) + j;
    for (let i = rows - 1; i >= 0; i -= 1) {
      for (let j = columns - 1; j >= 0; j -= 1) {
        longest[at(i, j)] = a[start + i] === b[start + j] ? longest[at(i + 1, j + 1)] + 1 : Math.max(longest[at(i + 1, j)], longest[at(i, j + 1)]);
      }
    }
    const own = [new Uint8Array(a.length), new Uint8Array(b.length)];
    let [i, j] = [0, 0];
    while (i < rows || j < columns) {
      if (i < rows && j < columns && a[start + i] === b[start + j]) { i += 1; j += 1; }
      else if (j >= columns || (i < rows && longest[at(i + 1, j)] >= longest[at(i, j + 1)])) { own[0][start + i] = 1; i += 1; }
      else { own[1][start + j] = 1; j += 1; }
    }
    return [pieces(a, own[0]), pieces(b, own[1])];
  }
  function pieces(words, own) {
    const found = [];
    words.forEach((word, place) => {
      const last = found[found.length - 1];
      if (last && last[1] === Boolean(own[place])) last[0] += word;
      else found.push([word, Boolean(own[place])]);
    });
    return found;
  }
  const addresses = [...given.pictures];
  // Pictures are taken into the page at the start: the result shows them when the server has ended.
  async function fetchPictures() {
    for (const [place, address] of given.pictures.entries()) {
      const reply = await fetch(address).catch(() => null);
      if (reply) addresses[place] = reply.ok ? URL.createObjectURL(await reply.blob()) : null;
    }
    shownItem = null;
    refresh();
  }
  function pictures(pair) {
    return pair.pictures.map((place, number) => {
      const name = `Picture ${number + 1} of the prompt`;
      return addresses[place] === null ? make("p", {}, `${name} is not there`) : make("img", { src: addresses[place], alt: name });
    });
  }
  function showPair() {
    const pair = pairs.get(item());
    const marked = view.marks ? differences(pair.left, pair.right) : null;
    fill(byId("prompt"), pair.prompt);
    fill(byId("left"), pair.left, marked && marked[0]);
    fill(byId("right"), pair.right, marked && marked[1]);
    if (view.marks && !marked) say("Too long to mark the differences");
    byId("pictures").replaceChildren(...pictures(pair));
    byId("pictures").hidden = !pair.pictures.length;
    byId("prompt").hidden = !pair.prompt && pair.pictures.length > 0;
  }
  function refresh() {
    if (over) return;
    const answers = votes.answers();
    const problem = votes.problem();
    byId("notice").hidden = !problem;
    if (byId("notice").firstChild.textContent !== problem) byId("notice").firstChild.textContent = problem;
    byId("again").hidden = !votes.retries();
    byId("saved").textContent = answers.size || votes.unsafe() ? votes.words() : "";
    byId("saved").classList.toggle("open", votes.unsafe() && Boolean(problem));
    showProgress(answers);
    if (item() && !votes.closed()) showCurrent(answers);
    else showEnd(answers);
  }
  function showProgress(answers) {
    const bar = byId("progress");
    bar.setAttribute("aria-valuemax", pairs.size);
    bar.setAttribute("aria-valuenow", answers.size);
    bar.setAttribute("aria-valuetext", `${answers.size} of ${pairs.size} judged`);
    if (bar.childElementCount !== view.order.length) bar.replaceChildren(...view.order.map(() => make("span", {})));
    view.order.forEach((each, place) => {
      bar.children[place].className = `${answers.has(each) ? "judged" : ""} ${place === view.at ? "here" : ""}`;
    });
    byId("place").textContent = item() ? `Pair ${view.at + 1} of ${pairs.size}` : `${answers.size} of ${pairs.size} judged`;
  }
  function showCurrent(answers) {
    document.body.dataset.screen = "pair";
    document.body.classList.toggle("mono", view.mono);
    for (const name of ["mono", "marks"]) byId(name).setAttribute("aria-pressed", view[name]);
    const chosen = answers.get(item());
    document.querySelectorAll("[data-choice]").forEach((each) => each.setAttribute("aria-pressed", each.dataset.choice === chosen));
    byId("back").disabled = view.at === 0;
    byId("skip").hidden = chosen !== undefined;
    byId("forward").hidden = byId("withdraw").hidden = chosen === undefined;
    if (shownItem === item()) return;
    shownItem = item();
    shownAt = performance.now();
    showPair();
    byId("pair").classList.remove("fresh");
    requestAnimationFrame(() => byId("pair").classList.add("fresh"));
    scrollTo(0, 0);
  }

  // --- the end --------------------------------------------------------------------------------------------------------

  function sheet(...children) {
    document.body.dataset.screen = "end";
    shownItem = null;
    byId("end").replaceChildren(...children);
    byId("end").focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  function showWords(title, paragraphs) {
    stopClock();
    over = true;
    byId("notice").hidden = true;
    byId("saved").textContent = "";
    sheet(make("h2", {}, title), ...paragraphs.map((words) => make("p", {}, words)));
  }
  let drawn = "";
  function showEnd(answers) {
    const [open, closed] = [pairs.size - answers.size, votes.closed()];
    const drawing = `${open} ${closed}`;
    if (document.body.dataset.screen === "end" && drawn === drawing) return;
    drawn = drawing;
    if (live) sheet(...endOnServer(open));
    else sheet(...(closed ? endSaved() : endInBrowser(open)));
  }
  function endTitle(open) {
    if (!pairs.size) return "There is no pair to judge: both answers are the same text everywhere";
    return open ? `${count(open, "pair is", "pairs are")} not judged yet` : `All ${pairs.size} pairs are judged`;
  }
  function otherWay(open) {
    if (!pairs.size) return [];
    return [open ? button("Judge the rest", () => go(nextOpen(-1)), true) : button("Look at them again", () => go(view.order.length - 1))];
  }
  function endOnServer(open) {
    const finish = button(open ? "Finish all the same" : "Finish and show the names", async (event) => {
      event.target.disabled = true;
      const state = await votes.finish();
      event.target.disabled = false;
      if (state) showResult(state);
    }, !open);
    return [
      make("h2", {}, endTitle(open)),
      make("p", {}, "When you finish, the names are shown, and your votes cannot be changed any more."),
      open ? make("p", {}, "You can also close this page and go on later: what you judged is kept.") : "",
      make("div", { className: "actions" }, ...(open ? [...otherWay(open), finish] : [finish, ...otherWay(open)])),
    ];
  }
  function endInBrowser(open) {
    const finish = button(open ? "Finish all the same and save" : "Finish and save the votes", () => download(votes.file(true)), !open);
    return [
      make("h2", {}, endTitle(open)),
      make("p", {}, `Your votes go into a file, ${fileName()}. Send it back to whoever gave you this page: there it is told which answer was whose.`),
      make("div", { className: "actions" }, ...(open ? [...otherWay(open), finish] : [finish, ...otherWay(open)]),
        open ? button("Save a copy and go on later", () => download(votes.file(false))) : ""),
    ];
  }
  function endSaved() {
    const text = make("textarea", { readOnly: true, value: votes.file(true), onfocus: (event) => event.target.select() });
    text.setAttribute("aria-label", "Content of the file");
    return [
      make("h2", {}, "Thank you. One thing is left to do"),
      make("p", {}, `Send the file ${fileName()} back to whoever gave you this page. Your browser put it where downloads go.`),
      make("div", { className: "actions" }, button("Save it again", () => download(votes.file(true)), true),
        button("Change my votes", () => { votes.reopen(); go(view.order.length - 1); })),
      make("details", { className: "copy" }, make("summary", {}, "No file came? Send this text instead"), text),
    ];
  }
  const fileName = () => `votes-${given.rater}.json`;
  function download(text) {
    const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    make("a", { href: address, download: fileName() }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  }
  function showResult(state) {
    const { result, answers } = state;
    if (!result) {
      showWords("Finished", ["Your votes are kept. The result cannot be shown here; the command says why."]);
      return;
    }
    const { names, wins } = result;
    const parts = [
      [`Preferred: ${names[0]}`, wins[0], "first"], ["About the same", result.ties, "same"], ["Both bad", result.both_bad, "same"],
      [`Preferred: ${names[1]}`, wins[1], "second"],
    ];
    const rest = [["The same text twice, not shown", result.same_text], ["Not judged", result.not_judged]].filter(([, number]) => number);
    const bar = make("div", { className: "bar" }, ...parts.filter(([, number]) => number).map(([, number, kind]) => {
      const part = make("span", { className: kind });
      part.style.flexGrow = number;
      return part;
    }));
    bar.setAttribute("role", "img");
    bar.setAttribute("aria-label", parts.map(([name, number]) => `${name}: ${number}`).join(", "));
    const line = ([name, number, kind]) => make("li", {}, make("i", { className: kind || "" }), make("span", {}, name), make("b", {}, String(number)));
    showWords(`You preferred ${names[0]} in ${count(wins[0], "pair", "pairs")} and ${names[1]} in ${wins[1]}`, [result.reading]);
    byId("end").append(
      bar, make("ul", { className: "legend" }, ...parts.map(line), ...rest.map(line)),
      make("h3", {}, "What you judged"), ...given.pairs.map((pair, place) => judged(pair, place, result, answers[pair.item])),
      make("p", { className: "muted" }, "You can close this page."),
    );
  }
  function judged(pair, place, result, choice) {
    const onLeft = result.left[pair.item];
    const name = { left: result.names[onLeft], right: result.names[1 - onLeft], tie: CHOICES.tie, both_bad: CHOICES.both_bad }[choice] || "not judged";
    const side = (text, words, chosen) => {
      const box = make("div", { className: "text", dir: "auto" });
      fill(box, text);
      return make("div", { className: chosen ? "answer chosen" : "answer" }, make("h2", {}, words), box);
    };
    return make("details", {},
      make("summary", {}, make("span", { className: "muted" }, String(place + 1)), make("span", { dir: "auto" }, pair.prompt.trim() || "(picture)"), make("b", {}, name)),
      make("div", { className: "pictures", hidden: !pair.pictures.length }, ...pictures(pair)),
      make("div", { className: "text", dir: "auto" }, pair.prompt),
      make("div", { className: "answers" },
        side(pair.left, `A: ${result.names[onLeft]}`, choice === "left"), side(pair.right, `B: ${result.names[1 - onLeft]}`, choice === "right")));
  }

  // --- keys and buttons -----------------------------------------------------------------------------------------------

  const KEYS = {
    1: () => choose("left"), arrowleft: () => choose("left"), 2: () => choose("right"), arrowright: () => choose("right"),
    3: () => choose("tie"), arrowdown: () => choose("tie"), 4: () => choose("both_bad"), backspace: back, arrowup: back,
    enter: forward, s: skip, m: () => toggle("mono"), d: () => toggle("marks"), "?": () => byId("help").showModal(),
  };
  const scrolls = (box) => box.scrollHeight > box.clientHeight + 1;
  addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || over || votes.closed() || byId("help").open) return;
    if (!Object.hasOwn(KEYS, key) || (!item() && KEYS[key] !== back)) return;
    if (key === "enter" && event.target.closest("button, summary, a")) return;
    // Up and down scroll what the rater is in, or the window, where there is more to read.
    const box = event.target.closest(".text") || document.scrollingElement;
    if ((key === "arrowup" || key === "arrowdown") && scrolls(box)) return;
    event.preventDefault();
    if (!event.repeat) KEYS[key]();
  });
  document.querySelectorAll("[data-choice]").forEach((each) => each.addEventListener("click", () => choose(each.dataset.choice)));
  const CLICKS = {
    back, skip, forward, withdraw, early: () => go(view.order.length), mono: KEYS.m, marks: KEYS.d, keys: KEYS["?"], again: () => votes.retry(),
  };
  for (const [id, action] of Object.entries(CLICKS)) byId(id).addEventListener("click", action);
  document.addEventListener("visibilitychange", () => { if (document.hidden) stopClock(); else startClock(); });
  addEventListener("pagehide", () => { stopClock(); keep("sessionStorage", viewKey, view); });
  addEventListener("beforeunload", (event) => { if (votes.unsafe() && !over) event.preventDefault(); });

  const votes = live ? onServer() : inBrowser();
  byId("title").textContent = `${given.title} · ${given.rater}`;
  if (live && given.closed) showWords("This sitting is finished", ["The command shows its result."]);
  else go(view.at < 0 ? nextOpen(-1) : view.at);
  if (live) fetchPictures();
  if (votes.unsafe()) votes.retry();
})();
