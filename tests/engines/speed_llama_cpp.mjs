// How fast llama.cpp runs GGUF files, in turns: node speed_llama_cpp.mjs ROUNDS PREFILL DECODE FILE ... (in .engines/llama.cpp)
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [rounds, prefill, decode, ...files] = process.argv.slice(2);
const find = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(find.resolve("node-llama-cpp")));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const prompt = Array.from({length: Number(prefill)}, (_, i) => 100 + 37 * (i % 1000));
const next = {generateNext: {token: true, options: {temperature: 0}}};

for (let round = 0; round < Number(rounds); round++) {
    for (const path of files) {
        const model = await llama.loadModel({modelPath: path});
        const context = await model.createContext({contextSize: prompt.length + Number(decode), batchSize: 512});
        const sequence = context.getSequence();
        let start = process.cpuUsage();
        const seconds = () => {
            const used = process.cpuUsage(start);
            start = process.cpuUsage();
            return (used.user + used.system) / 1e6;
        };
        let answer = await sequence.controlledEvaluate([...prompt.slice(0, -1), [prompt.at(-1), next]]);
        const reading = seconds();
        for (let i = 1; i < Number(decode); i++)
            answer = await sequence.controlledEvaluate([[answer.at(-1).next.token, next]]);
        const writing = seconds();
        console.log(JSON.stringify({path, prefill: prompt.length / reading, decode: (Number(decode) - 1) / writing}));
        await context.dispose();
        await model.dispose();
    }
}
await llama.dispose();
