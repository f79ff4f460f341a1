// The listening page. Gradio runs this once, with `element` (page.html), `props` (its settings) and `server` (the questions of
// service.py). Nothing that comes from the server is put into the page as HTML, except the ranking, which is escaped there.
const settings = props.settings;
const find = selector => element.querySelector(selector);
const all = selector => [...element.querySelectorAll(selector)];
const SIDES = ["a", "b"];

// -- what this browser keeps ---------------------------------------------------------------------------------------------

const kept = {
  // A browser that keeps no site data throws as soon as it is asked for the storage itself: then until the page closes.
  get(name, storage = "localStorage") {
    if (name in this.here) return this.here[name];
    try { return window[storage].getItem(`musicrl.${settings.collection}.${name}`); } catch { return null; }
  },
  set(name, value, storage = "localStorage") {
    const key = `musicrl.${settings.collection}.${name}`;
    delete this.here[name];
    try { value === null ? window[storage].removeItem(key) : window[storage].setItem(key, value); } catch { this.here[name] = value; }
  },
  here: {},
};

// Every code of this browser, the newest last: who agrees to a new text gets a new one, and their earlier votes stay under the old.
function ownCodes() {
  const latest = kept.get("code");
  let codes = null;
  try { codes = JSON.parse(kept.get("codes")); } catch { /* not what this page writes */ }
  codes = Array.isArray(codes) ? codes.filter(each => typeof each === "string") : [];
  return latest === null || codes.some(each => letters(each) === letters(latest)) ? codes : [...codes, latest];
}

function letters(text) {
  return (text ?? "").replace(/[\s-]/g, "").toUpperCase();
}

let code = kept.get("code");
let deal = null;
let sending = false;
let asking = 0; // number of the newest question for a pair: answers to older ones come too late
let polling = null; // id of the timer that asks again

async function ask(question, data = {}) {
  try {
    const answer = await server[question]({ code, ...data });
    if (answer && typeof answer.ok === "boolean") return answer;
  } catch { /* told below */ }
  return { ok: false, offline: true, error: "The server does not answer. Your votes so far are kept: try again in a moment." };
}

function tell(text, wrong = false, where = find('[data-view="listen"] > .status')) {
  where.textContent = text;
  where.classList.toggle("wrong", wrong);
}

function show(name) {
  for (const part of ["consent", "code", "busy", "pair"]) find(`.${part}`).hidden = part !== name;
  find(".own").hidden = find(".typing").hidden = !["pair", "busy"].includes(name);
  if (!settings.typing) find(".typing").hidden = true;
  if (name !== "pair") stop();
}

function stop() {
  for (const side of SIDES) players[side].audio.pause();
}

// -- listening and voting: the players are in player.js ----------------------------------------------------------------------

const players = Object.fromEntries(SIDES.map(side => [side, new Player(side)]));

async function next(pair = null) {
  const mine = ++asking;
  clearTimeout(polling);
  if (code === null) return consent();
  const answer = await ask("next", pair === null ? {} : { pair });
  if (mine !== asking) return;
  if (answer.unknown) return consent(answer.error);
  if (!answer.ok) {
    if (answer.offline) polling = setTimeout(next, 5000);
    return tell(answer.error, true);
  }
  counted(answer.given);
  if (answer.deal) {
    if (settings.study) find("#count").textContent = ` · pair ${answer.given + 1} of ${answer.total}${answer.growing ? " so far" : ""}`;
    return hear(answer.deal, mine);
  }
  deal = null;
  if (answer.more) {
    wait(`The ${answer.given ? "next" : "first"} pair is being made`, "This goes on by itself, in a moment.");
    polling = setTimeout(next, 2000);
  } else {
    wait("That was the last pair: thank you", "You have heard every pair there is for you.", false);
  }
}

function wait(title, text, busy = true) {
  find("#busy-title").textContent = title;
  find(".busy .told").textContent = text;
  find(".busy .bar").hidden = !busy;
  show("busy");
}

async function hear(dealt, mine) {
  stop();
  deal = dealt;
  find("#prompt").textContent = deal.prompt;
  for (const radio of all(".rating input")) { radio.checked = false; radio.disabled = true; }
  const before = JSON.parse(kept.get("heard", "sessionStorage") ?? "null");
  const heard = before && before.id === deal.id ? before : { a: 0, b: 0 };
  show("pair");
  find(".choices").hidden = settings.study;
  find(".rated").hidden = !settings.study;
  try {
    await Promise.all(SIDES.map(side => players[side].load(deal.clip_token, deal.least, heard[side])));
  } catch {
    if (mine === asking) { tell("The clips did not arrive: the page asks for them again.", true); polling = setTimeout(next, 5000); }
    return;
  }
  if (mine === asking) unlock();
}

function unlock() {
  const ready = deal !== null && !sending && SIDES.every(side => players[side].enough);
  for (const button of all(".choices button")) button.disabled = !ready;
  for (const radio of all(".rating input")) radio.disabled = !ready;
  const rated = SIDES.every(side => find(`[name=score_${side}]:checked`));
  find(".send").disabled = !(ready && rated);
  const seconds = deal ? Math.round(deal.least * 10) / 10 : 0;
  const opens = `opens after ${seconds} ${seconds === 1 ? "second" : "seconds"} of each clip.`;
  const hint = !ready ? (settings.study ? `Rating ${opens}` : `Voting ${opens}`)
    : settings.study ? "Rate both clips. Equal ratings are fine." : "Which of the two do you prefer, for this prompt?";
  if (find(".hint").textContent !== hint) find(".hint").textContent = hint;
}

async function vote(answer) {
  if (sending || !deal || !SIDES.every(side => players[side].enough)) return;
  stop();
  sending = true;
  unlock();
  const heard = { seconds_a: players.a.heard, seconds_b: players.b.heard };
  const reply = await ask("vote", { token: deal.token, ...heard, ...answer });
  sending = false;
  if (reply.unknown) return consent(reply.error);
  if (!reply.ok) { unlock(); return tell(reply.error, true); }
  counted(reply.given);
  if (!find(".typing button").disabled) find(".typing .made").textContent = "";
  tell(reply.counted ? "" : "You had voted on this pair before: that vote counts.");
  deal = null;
  await next();
  (find(".pair").hidden ? find("#busy-title") : find("#prompt")).focus();
}

function counted(given) {
  find(".given").textContent = given === 1 ? "1 vote of yours is kept" : `${given} votes of yours are kept`;
}

for (const button of all(".choices button")) button.addEventListener("click", () => vote({ preference: button.dataset.vote }));
for (const radio of all(".rating input")) radio.addEventListener("change", unlock);
find(".send").addEventListener("click", () => vote(Object.fromEntries(
  SIDES.map(side => [`score_${side}`, Number(find(`[name=score_${side}]:checked`).value)]))));

// -- consent and the private code ---------------------------------------------------------------------------------------------

function consent(text = "") {
  deal = null;
  tell(text, true);
  show("consent");
}

for (const text of settings.consent.split("\n\n")) {
  const paragraph = document.createElement("p");
  const [, head, rest] = text.match(/^([A-Z][\w ]{3,24}[:.])(?= )(.*)$/s) ?? [null, "", text];
  const strong = document.createElement("strong");
  strong.textContent = head;
  paragraph.append(...(head ? [strong] : []), rest);
  find(".terms").append(paragraph);
}
find("[name=agree]").addEventListener("change", event => { find(".consent .primary").disabled = !event.target.checked; });
find(".consent").addEventListener("submit", async event => {
  event.preventDefault();
  find(".consent .primary").disabled = true;
  const answer = await ask("consent", { consent_id: settings.consent_id });
  find(".consent .primary").disabled = !find("[name=agree]").checked;
  if (!answer.ok) return tell(answer.error, true);
  keep(answer.code);
  reveal();
});
find(".known").addEventListener("click", async () => {
  code = find(".consent [name=code]").value;
  const answer = await ask("next");
  if (!answer.ok) { const wrong = answer.error; code = kept.get("code"); return tell(wrong, true); }
  keep(code);
  tell("");
  next();
});

function keep(value) {
  const others = ownCodes().filter(each => letters(each) !== letters(value));
  kept.set("codes", JSON.stringify([...others, value]));
  code = value;
  kept.set("code", value);
}

function forget(value) {
  kept.set("codes", JSON.stringify(ownCodes().filter(each => letters(each) !== letters(value))));
  if (letters(value) === letters(kept.get("code"))) { code = null; kept.set("code", null); }
}

function reveal() {
  tell("");
  find(".secret code").textContent = code;
  const earlier = ownCodes().filter(each => letters(each) !== letters(code));
  find(".earlier").hidden = !earlier.length;
  find(".earlier span").textContent = earlier.join(", ");
  find(".copy").textContent = "Copy";
  show("code");
  find("#code-title").focus();
}
find(".copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText(code); find(".copy").textContent = "Copied"; } catch {
    getSelection().selectAllChildren(find(".secret code")); // no clipboard without HTTPS: Ctrl+C does it
    find(".copy").textContent = "Selected";
  }
});
find(".go").addEventListener("click", () => next().then(() => find("#prompt").focus()));
find(".show").addEventListener("click", reveal);

// -- prompts of one's own -------------------------------------------------------------------------------------------------------

find("#typed").maxLength = settings.prompt_length;
find(".typing").addEventListener("submit", async event => {
  event.preventDefault();
  const answer = await ask("type", { prompt: find("#typed").value });
  if (answer.unknown) return consent(answer.error);
  if (!answer.ok) return tell(answer.error, true);
  tell("");
  find("#typed").value = "";
  find(".typing button").disabled = true;
  progress();
});

async function progress() {
  const answer = await ask("progress");
  const about = answer.seconds === null || answer.seconds === undefined ? "" : `, about ${Math.max(1, Math.round(answer.seconds))} s`;
  const line = find(".typing .made");
  if (answer.ok && ["waiting", "making"].includes(answer.state)) {
    line.textContent = answer.before ? `Your pair waits for ${answer.before} before it${about}.` : `Your pair is being made${about}.`;
    return setTimeout(progress, 1000);
  }
  if (answer.offline) return setTimeout(progress, 5000);
  find(".typing button").disabled = false;
  line.textContent = { failed: "This pair could not be made. Another prompt may do better.", }[answer.state] ?? "";
  if (answer.state !== "made") return;
  if (deal === null) {
    line.textContent = "";
    return next(answer.pair);
  }
  line.textContent = "Your pair is ready: it comes after this one."; // nobody is interrupted while they listen
}

// -- the other parts of the page ------------------------------------------------------------------------------------------------

for (const tab of all("nav button")) {
  if (tab.dataset.view === "board" && !settings.board) tab.hidden = true;
  tab.addEventListener("click", async () => {
    for (const other of all("nav button")) other === tab ? other.setAttribute("aria-current", "page") : other.removeAttribute("aria-current");
    for (const view of all(".view")) view.hidden = view.dataset.view !== tab.dataset.view;
    if (tab.dataset.view !== "listen") stop();
    if (tab.dataset.view === "board") {
      const answer = await ask("board");
      if (answer.ok) find(".board").innerHTML = answer.html; else find(".board").textContent = answer.error;
    }
    if (tab.dataset.view === "leave") fillLeave();
  });
}

function fillLeave() {
  const codes = ownCodes();
  find("[name=withdrawn]").value = codes.join("\n");
  find("[name=withdrawn]").rows = Math.max(1, codes.length);
}

find("[name=sure]").addEventListener("change", event => { find(".leave .danger").disabled = !event.target.checked; });
find(".leave").addEventListener("submit", async event => {
  event.preventDefault();
  const wanted = find("[name=withdrawn]").value.split("\n").filter(line => line.trim());
  const left = [];
  let removed = 0, done = 0, wrong = "";
  for (const each of wanted) {
    const answer = await ask("withdraw", { withdrawn: each });
    if (answer.ok) { removed += answer.removed; done += 1; } else { wrong = answer.error; left.push(each); }
    if (!answer.offline) forget(each); // withdrawn before, perhaps elsewhere: nothing is kept under it either way
  }
  const votes = removed === 1 ? "1 vote is" : `${removed} votes are`;
  const told = left.length ? wrong : "Nothing of yours is kept any more. Thank you for listening.";
  tell(done ? `${votes} deleted. ${told}` : wrong || "Please give your private code.", !done || left.length > 0, find(".leave .status"));
  if (done && !left.length) {
    find(".leave").reset();
    find(".leave .danger").disabled = true;
  } else find("[name=withdrawn]").value = left.join("\n");
  if (code === null) { find("[name=agree]").checked = false; next(); }
});

if (settings.study) {
  find("h1").textContent = "How good is each of these?";
  find(".task").textContent = "rate each from 1, bad, to 5, excellent";
}
find(".votekeys").hidden = settings.study;
find("[name=keys]").checked = kept.get("keys") !== "off";
find("[name=keys]").addEventListener("change", event => kept.set("keys", event.target.checked ? "on" : "off"));
document.addEventListener("keydown", event => {
  const typing = event.target.matches?.("input:not([type=radio], [type=checkbox], [type=range]), textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat || !find("[name=keys]").checked) return;
  if (find(".pair").hidden || find('[data-view="listen"].view').hidden) return;
  const key = event.key.toLowerCase();
  if (SIDES.includes(key)) players[key].toggle();
  else if (!settings.study && "1234".includes(key)) vote({ preference: ["a", "b", "tie", "both_bad"][key - 1] });
  else return;
  event.preventDefault();
});

// Another tab of this browser joined or withdrew.
addEventListener("storage", event => {
  if (event.key !== `musicrl.${settings.collection}.code`) return;
  code = event.newValue;
  next();
});

next();
