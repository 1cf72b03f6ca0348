// Text to token ids and back, and the model's own chat template.

import { Template } from "./lib/jinja.mjs";
import { Tokenizer } from "./lib/tokenizers.mjs";

const UNFINISHED = "\ufffd"; // a character whose bytes are not all there yet
const LONGEST_CHARACTER = 6; // tokens: one of context, four of a byte each, and the next

export class TextCodec {
  constructor(tokenizer, tokenizerConfig, config) {
    this.tokenizer = new Tokenizer(tokenizer, tokenizerConfig);
    this.template = config.template ? new Template(config.template) : null;
    const text = (token) => (typeof token === "string" ? token : (token?.content ?? ""));
    this.names = { bos_token: text(tokenizerConfig.bos_token), eos_token: text(tokenizerConfig.eos_token) };
  }

  /** Token ids of a conversation ({role, content}); without a template, of its last text. */
  encodeTurns(turns) {
    if (!this.template) return this.encode(turns.at(-1).content);
    const written = this.template.render({ messages: turns, add_generation_prompt: true, ...this.names });
    return this.encode(written, { add_special_tokens: false });
  }

  encode(text, options = {}) {
    return Array.from(this.tokenizer.encode(text, options).ids, Number);
  }

  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true }) : "";
  }

  /** {push, rest}: the text that became complete with the next token id, and what is left at the end. */
  stream() {
    let ids = [];
    let shown = "";
    const push = (id) => {
      ids.push(id);
      const text = this.decode(ids);
      if (text.endsWith(UNFINISHED) && ids.length < LONGEST_CHARACTER) return "";
      const piece = text.slice(shown.length);
      // What follows depends on one token of context only (decoders join words by it).
      ids = [id];
      shown = this.decode(ids);
      return piece;
    };
    return { push, rest: () => this.decode(ids).slice(shown.length) };
  }
}
