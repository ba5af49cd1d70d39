// Where votes are kept: on the server that sent the page, or in this browser until they are saved as a file.
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
    problem = `${why}${waits} If the command has ended, start it again and open the address that it prints${waiting.length ? "; these pairs come up there once more" : ""}.`;
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
    text() {
      const { acts, closed } = read();
      return JSON.stringify({ loralab_votes: given.version, items_sha256: given.items_sha256, rater: given.rater, acts, closed: closed === true }, null, 1);
    },
    setClosed: (closed) => write({ acts: read().acts, closed }),
  };
}
