// Stream text from Drift with @grpc/grpc-js: npm install @grpc/grpc-js @grpc/proto-loader
//
//   node drift_client.mjs 127.0.0.1:50051 "A list is" [TOKENS]

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [target, prompt, tokens = "40"] = process.argv.slice(2);
const protos = fileURLToPath(new URL("../../proto", import.meta.url));
// `defaults` stays off: what is absent is absent, not zero.
const definition = loader.loadSync("drift_gateway/v1/generation.proto", {
  includeDirs: [protos], keepCase: true, longs: Number, enums: String, oneofs: true,
});
const { drift } = grpc.loadPackageDefinition(definition);
const client = new drift.v1.GenerationService(target, grpc.credentials.createInsecure());

const call = client.Generate({
  text: prompt,
  sampling: { temperature: 0 },
  stopping: { max_tokens: Number(tokens) },
  slo: { ttft_ms: 2000, tbt_ms: 100 },
});
call.on("data", ({ token_delta, finished }) => {
  if (token_delta?.text) process.stdout.write(token_delta.text);
  if (finished) {
    const { ttft_ms, tbt_p99_ms } = finished.timing;
    console.error(`\nfirst token ${ttft_ms?.toFixed(1)} ms, p99 between tokens ${tbt_p99_ms?.toFixed(1)} ms`);
  }
});
call.on("end", () => process.stdout.write("\n"));
call.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
