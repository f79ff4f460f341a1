// Two players, of which one sounds. page.js, which Gradio runs in one piece with this, has what is named but not defined here.
const BARS = 60;

class Player {
  constructor(side) {
    const name = side.toUpperCase();
    this.box = find(`.clip[data-side=${side}]`);
    this.box.innerHTML =
      `<div class="player"><button type="button" class="play" aria-pressed="false" aria-label="Play clip ${name}"
         aria-keyshortcuts="${name}" disabled><svg viewBox="0 0 24 24" aria-hidden="true"><path class="start" d="M7 4v16l13-8z"/><path
         class="pause" d="M6 4h4v16H6zM14 4h4v16h-4z"/></svg></button>
       <div class="wave"><svg viewBox="0 0 ${BARS} 40" preserveAspectRatio="none" aria-hidden="true"><path/></svg>
         <svg class="played" viewBox="0 0 ${BARS} 40" preserveAspectRatio="none" aria-hidden="true"><path/></svg>
         <input type="range" min="0" max="1" step="0.1" value="0" aria-label="Position in clip ${name}"></div>
       <span class="name">${name}</span><span class="time"><span class="at"></span><span class="heard"></span></span></div>` +
      (settings.study ? this.rating(side, name) : "");
    this.side = side;
    this.button = this.box.querySelector(".play");
    this.slider = this.box.querySelector("input[type=range]");
    this.audio = new Audio();
    this.audio.preload = "auto";
    this.heard = this.last = this.least = 0;
    this.button.addEventListener("click", () => this.toggle());
    this.slider.addEventListener("input", () => { this.audio.currentTime = this.slider.valueAsNumber; });
    for (const event of ["timeupdate", "pause", "ended"]) this.audio.addEventListener(event, () => this.listened());
    this.audio.addEventListener("seeking", () => { this.last = this.audio.currentTime; this.draw(); });
    for (const event of ["play", "pause"]) this.audio.addEventListener(event, () => this.changed());
  }

  rating(side, name) {
    const words = ["bad", "poor", "fair", "good", "excellent"];
    const labels = words.map((word, i) =>
      `<label><input type="radio" name="score_${side}" value="${i + 1}" disabled><b>${i + 1}</b>${word}</label>`);
    return `<fieldset class="rating"><legend>How good is clip ${name}, for this prompt?</legend><div>${labels.join("")}</div></fieldset>`;
  }

  async load(token, least, heard) {
    this.least = least;
    this.heard = heard;
    this.last = 0;
    this.button.disabled = true;
    const answer = await fetch(`clip/${token}/${this.side}`);
    if (!answer.ok) throw new Error("no clip");
    const bytes = await answer.arrayBuffer();
    if (this.address) URL.revokeObjectURL(this.address);
    this.address = URL.createObjectURL(new Blob([bytes], { type: "audio/wav" }));
    const { bars, seconds } = loudness(bytes);
    this.seconds = seconds;
    for (const path of this.box.querySelectorAll(".wave path"))
      path.setAttribute("d", bars.map((bar, i) => `M${i + .5} ${20 - 18 * bar}V${20 + 18 * bar + .01}`).join(""));
    this.slider.max = seconds;
    this.audio.src = this.address;
    this.button.disabled = false;
    this.draw();
  }

  toggle() {
    if (this.button.disabled) return;
    if (!this.audio.paused) return this.audio.pause();
    players[this.side === "a" ? "b" : "a"].audio.pause();
    if (this.audio.ended) this.audio.currentTime = 0;
    this.last = this.audio.currentTime;
    this.audio.play().catch(error => {
      if (error.name !== "AbortError") tell("This browser does not play the clip. Another browser may.", true); // Abort: paused
    });
  }

  listened() {
    const now = this.audio.ended ? this.seconds : this.audio.currentTime;
    const step = now - this.last;
    if (step > 0 && step < 2) this.heard += step; // more is a jump
    this.last = now;
    if (deal) kept.set("heard", JSON.stringify({ id: deal.id, a: players.a.heard, b: players.b.heard }), "sessionStorage");
    this.draw();
    unlock();
  }

  changed() {
    const sounding = !this.audio.paused;
    this.button.setAttribute("aria-pressed", sounding);
    this.button.setAttribute("aria-label", `${sounding ? "Pause" : "Play"} clip ${this.side.toUpperCase()}`);
    this.box.classList.toggle("sounding", sounding);
  }

  get enough() { return this.heard >= this.least - .02; }

  draw() {
    const now = Math.min(this.audio.currentTime, this.seconds);
    this.slider.value = now;
    this.slider.setAttribute("aria-valuetext", `${now.toFixed(1)} of ${this.seconds.toFixed(1)} seconds`);
    this.box.querySelector(".played").style.clipPath = `inset(0 ${100 - 100 * now / this.seconds}% 0 0)`;
    this.box.querySelector(".at").textContent = `${now.toFixed(1)} / ${this.seconds.toFixed(1)} s`;
    const heard = this.box.querySelector(".heard");
    heard.textContent = this.enough ? "heard" : `${Math.ceil(Math.max(0, this.least - this.heard))} s to hear`;
    heard.classList.toggle("enough", this.enough);
  }
}

// 16-bit WAV, as the server writes it: the browser's own decoder would resample, and refuses low rates.
function loudness(bytes) {
  const view = new DataView(bytes);
  const channels = view.getUint16(22, true);
  const rate = view.getUint32(24, true);
  let at = 12;
  while (view.getUint32(at, false) !== 0x64617461) at += 8 + view.getUint32(at + 4, true); // until "data"
  const samples = new Int16Array(bytes.slice(at + 8, at + 8 + view.getUint32(at + 4, true)));
  const each = Math.max(1, Math.floor(samples.length / BARS));
  const bars = Array.from({ length: BARS }, (_, bar) => {
    let sum = 0;
    for (let i = bar * each; i < (bar + 1) * each; i++) sum += (samples[i] ?? 0) ** 2;
    return Math.sqrt(sum / each);
  });
  const most = Math.max(...bars, 1);
  return { bars: bars.map(bar => bar / most), seconds: samples.length / channels / rate };
}
