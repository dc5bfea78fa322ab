// A machine that copies, stepped from Node.js: over ntm.v1, and over the open inference protocol.
//
//   npm install && node copy.mjs 127.0.0.1:50051 [LENGTH]
//
// It shows random bits to the model `copy`, asks for them back, and prints for each service how many bits are wrong.
// It ends with 1 if any is, or if the services differ in a single byte.

import { randomInt } from "node:crypto";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
const MODEL = "copy";
const NUM_BITS = 8;
const WIDTH = NUM_BITS + 1; // and the channel of the end marker

const loaded = grpc.loadPackageDefinition(
  loadSync(["ntm/v1/session_service.proto", "inference/grpc_service.proto"], {
    includeDirs: [PROTOS],
    keepCase: true,
    longs: Number,
    enums: String,
    defaults: true,
  }),
);

/** Calls of a service as promises, by the names that the proto gives them. */
function connect(Service, address) {
  const client = new Service(address, grpc.credentials.createInsecure());
  const call = (name, request) =>
    new Promise((resolve, reject) => {
      const deadline = new Date(Date.now() + 30_000);
      client[name](request, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
    });
  return { call, close: () => client.close() };
}

/** The elements of an FP32 tensor, little-endian as both services have them. */
const toBytes = (values) => {
  const bytes = Buffer.alloc(4 * values.length);
  values.forEach((value, index) => bytes.writeFloatLE(value, 4 * index));
  return bytes;
};
const toFloats = (bytes) => Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readFloatLE(4 * index));

/** The steps of the copy task: the bits, the end marker, and silence in which they are recalled. */
function stepsOf(bits) {
  const length = bits.length / NUM_BITS;
  const steps = new Array((2 * length + 1) * WIDTH).fill(0);
  bits.forEach((bit, index) => {
    steps[Math.floor(index / NUM_BITS) * WIDTH + (index % NUM_BITS)] = bit;
  });
  steps[length * WIDTH + NUM_BITS] = 1;
  return { values: steps, numSteps: 2 * length + 1 };
}

/** Steps of a session. A step's number makes the call safe to repeat. */
async function overSessions(address, steps) {
  const { call, close } = connect(loaded.ntm.v1.SessionService, address);
  try {
    const { session } = await call("CreateSession", { model_name: MODEL });
    const { outputs } = await call("Step", {
      session_id: session.session_id,
      first_step: 0,
      inputs: { dtype: "DATA_TYPE_FP32", shape: [steps.numSteps, WIDTH], raw: toBytes(steps.values) },
    });
    await call("DeleteSession", { session_id: session.session_id });
    return outputs.raw;
  } finally {
    close();
  }
}

/** Requests of a sequence: the shown bits with START, the rest with END. */
async function overInference(address, steps) {
  const { call, close } = connect(loaded.inference.GRPCInferenceService, address);
  const sequence = { string_param: `node-${randomInt(2 ** 32)}` };
  const infer = (values, parameters) =>
    call("ModelInfer", {
      model_name: MODEL,
      parameters: { sequence_id: sequence, ...parameters },
      inputs: [{ name: "input", datatype: "FP32", shape: [1, values.length / WIDTH, WIDTH] }],
      raw_input_contents: [toBytes(values)],
    });
  try {
    const half = Math.ceil(steps.numSteps / 2) * WIDTH;
    const shown = await infer(steps.values.slice(0, half), { sequence_start: { bool_param: true } });
    const recalled = await infer(steps.values.slice(half), { sequence_end: { bool_param: true } });
    return Buffer.concat([shown.raw_output_contents[0], recalled.raw_output_contents[0]]);
  } finally {
    close();
  }
}

const [address = "127.0.0.1:50051", length = "20"] = process.argv.slice(2);
const bits = Array.from({ length: Number(length) * NUM_BITS }, () => randomInt(2));
const steps = stepsOf(bits);
const answers = [];
let numWrong = 0;
for (const [name, run] of [["ntm.v1", overSessions], ["inference", overInference]]) {
  const outputs = await run(address, steps);
  const recalled = toFloats(outputs).slice(-bits.length);
  const wrong = recalled.filter((value, index) => value > 0.5 !== (bits[index] === 1)).length;
  console.log(`${name}: ${wrong} of ${bits.length} bits wrong`);
  answers.push(outputs);
  numWrong += wrong;
}
const isSame = answers[0].equals(answers[1]);
console.log(isSame ? "both services gave the same, bit for bit" : "the services differ");
process.exitCode = isSame && numWrong === 0 ? 0 : 1;
