// Tells a screen reader what the model writes: sentence by sentence, because single tokens cannot be understood.

const MOST_SENTENCES = 30;
const SENTENCE_END = /(?<!\d)[.!?:…。！？]["'”’)\]*_]*(?=\s)|\n\s*\n/g; // not after the number of a list's item
const CODE = /(```|~~~)[\s\S]*?(\1|$)/g;
const CODE_NAME = "Code block.\n\n"; // as long for code that still grows, so that places in the text stay

export class Announcer {
  constructor(region) {
    this.region = region;
    this.spoken = 0;
  }

  start() {
    this.spoken = 0;
    this.region.replaceChildren();
  }

  /** The whole text so far. */
  feed(text) {
    text = text.replace(CODE, CODE_NAME);
    SENTENCE_END.lastIndex = this.spoken;
    for (let match = SENTENCE_END.exec(text); match; match = SENTENCE_END.exec(text)) {
      const end = match.index + match[0].length;
      this.say(text.slice(this.spoken, end));
      this.spoken = end;
    }
  }

  finish(text, note) {
    this.feed(text);
    this.say(text.replace(CODE, CODE_NAME).slice(this.spoken));
    this.spoken = Infinity;
    this.say(note);
  }

  say(text) {
    const plain = text
      .replace(/\[([^\]]*)\]\([^)]*\)/g, "$1") // of a link its text
      .replace(/^[|\s:-]+$/gm, "") // the line below a table's head
      .replace(/[*_`#>|~]+/g, "")
      .trim();
    if (!plain) return;
    const line = document.createElement("p");
    line.textContent = plain;
    this.region.append(line);
    while (this.region.childElementCount > MOST_SENTENCES) this.region.firstElementChild.remove();
  }
}
