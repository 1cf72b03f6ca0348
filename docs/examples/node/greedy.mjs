// A package of faq-onnx in Node.js, as it is: greedy tokens behind a prompt of token ids.
//
//   ONNXRUNTIME_NODE_INSTALL=skip npm install
//   node greedy.mjs out/ 1,2,3 16
import ort from 'onnxruntime-node';

const [folder, prompt, count] = process.argv.slice(2);
const session = await ort.InferenceSession.create(`${folder}/model.onnx`);
const integers = (values) =>
  new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);

// The cache is empty at first: [batch, heads, 0, width].
const cache = {};
for (const { name, type, shape } of session.inputMetadata) {
  if (name.startsWith('past_key_values')) {
    cache[name] = new ort.Tensor(type, [], [1, shape[1], 0, shape[3]]);
  }
}

const tokens = [];
let read = prompt.split(',').map(Number);
let past = 0;
while (tokens.length < Number(count)) {
  const length = past + read.length;
  const feeds = {
    input_ids: integers(read),
    attention_mask: integers(Array(length).fill(1)),
    position_ids: integers([...Array(read.length).keys()].map((n) => past + n)),
    ...cache,
  };
  const known = Object.entries(feeds).filter(([name]) => session.inputNames.includes(name));
  const outputs = await session.run(Object.fromEntries(known));
  for (const [name, value] of Object.entries(outputs)) {
    if (name.startsWith('present')) cache[name.replace('present', 'past_key_values')] = value;
  }
  const vocabulary = outputs.logits.dims[2];
  const last = outputs.logits.data.slice(-vocabulary);
  read = [last.indexOf(last.reduce((best, value) => Math.max(best, value)))];
  tokens.push(read[0]);
  past = length;
}
console.log(JSON.stringify(tokens));
