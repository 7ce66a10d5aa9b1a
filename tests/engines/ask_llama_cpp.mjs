// Ask llama.cpp through node-llama-cpp: node ask_llama_cpp.mjs JOBS.json ANSWERS.jsonl
// One thread: two of them wait for each other actively, which a busy machine turns into minutes.
import {appendFileSync, readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [jobs, answers] = process.argv.slice(2);
const find = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(find.resolve("node-llama-cpp")));
const say = (answer) => appendFileSync(answers, JSON.stringify(answer) + "\n");
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});

for (const job of JSON.parse(readFileSync(jobs, "utf8"))) {
    say({name: job.name, started: true});
    try {
        const model = await llama.loadModel({modelPath: job.path, useMmap: true});
        const context = await model.createContext({
            contextSize: 256, batchSize: 256, flashAttention: false,
            experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
        });
        const sequence = context.getSequence();
        let input = job.prompt;
        const tokens = [], logprobs = [];
        const start = performance.now();
        while (tokens.length < job.count) {
            const last = [input.at(-1), {generateNext: {token: true, confidence: true, options: {temperature: 0}}}];
            const {next} = (await sequence.controlledEvaluate([...input.slice(0, -1), last])).at(-1);
            tokens.push(next.token);
            logprobs.push(Math.log(next.confidence));
            input = [next.token];
        }
        say({name: job.name, tokens, logprobs, seconds: (performance.now() - start) / 1000});
        await context.dispose();
        await model.dispose();
    } catch (error) {
        say({name: job.name, error: String(error.message ?? error).split("\n")[0]});
    }
}
await llama.dispose();
