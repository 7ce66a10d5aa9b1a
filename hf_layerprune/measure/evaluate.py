"""The measure stage: evaluate a model and its base on tasks and texts, and write the numbers to the model's folder.

metrics = evaluate(EvalRequest("pruned", base="org/base", tasks=("paper",)))
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..errors import CutError, LayerPruneError, boundary
from ..options import refuse_unused
from ..records.metrics import Metrics
from ..records.requirements import check_measurable
from ..runtime.windows import resolve_length
from .answers import answers_file, load_answers, save_answers
from .image_tasks import check_media_tasks, is_multimodal_task
from .measurement import Measurement
from .paired import compare_pairs, compare_values
from .requests import DEFAULT_LENGTH, EvalRequest
from .subject import Subject
from .tasks import SEED, load_tasks, task_dataset, task_files
from .texts import WIKITEXT2, Text, check_same_tokens, check_same_vocabulary, find_text, read_text, split_windows

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedModel

    from .harness import TaskRun, TaskRunner

logger = logging.getLogger(__name__)

# The metrics of texts; all others that tasks have are metrics of questions.
_TEXT_METRICS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


def evaluate(request: EvalRequest) -> Metrics:
    """Evaluate a model, and its base if one is given.

    Invalid requests are refused before a model is loaded, and results are written after each task. The numbers that
    the file already had are returned as well; their `outcomes` say which requirements they meet.

    Raises:
        CutError: A task, a text or a device is unknown, windows are longer than a model's context, a requirement is
            about something that is not measured, or an option has no effect.
        CheckpointError: A model can't be read, or existing numbers belong to other weights.
        LayerPruneError: A task or text is not available, or the model and its base can't be compared.
    """
    run = _Evaluation(request)
    run.run()
    return run.store.metrics


def check_request(request: EvalRequest) -> None:
    """Refuse, without its model, an evaluation that can't be run, or that will not measure what it requires.

    The model need not exist yet. Tasks and texts are loaded.

    Raises:
        CutError: A task or text is unknown, a requirement is about something that is not measured, or an option has no
            effect.
        LayerPruneError: A task or text is not available.
    """
    _resolve(request, Metrics(""))


def _resolve(request: EvalRequest, known: Metrics) -> tuple[dict[str, TaskDict], list[Text]]:
    """The tasks and texts of a request, which must measure what it requires and is not known yet."""
    texts, names = _resolve_texts(request), request.tasks
    if names is None and request.tasks_from is None:
        names = ("paper",) if request.texts is None else ()
    tasks = load_tasks(names, request.tasks_from, request.limit)
    if not tasks and not texts:
        raise CutError("there is nothing to measure; specify tasks=... or texts=...")
    if not tasks:
        refuse_unused(request, ("limit", "num_fewshot", "batch_size", "answers"), "without tasks")
    if not texts:
        refuse_unused(request, ("length", "windows"), "without texts")
    if request.require:
        text_names = [text.name for text in texts]
        check_measurable(request.require, known, tasks=[*tasks], texts=text_names, base=request.base is not None)
    return tasks, texts


def _resolve_texts(request: EvalRequest) -> list[Text]:
    if request.texts is not None:
        found: dict[str, Text] = {}
        for place in request.texts:
            text = find_text(place)
            if text.name in found:  # the numbers of one would replace those of the other
                raise CutError(
                    f"two texts are called {text.name}, the second of them {place}; rename one, or leave it out"
                )
            found[text.name] = text
        return [*found.values()]
    if request.tasks_from is not None:
        return [read_text(path) for path in task_files(request.tasks_from, ".txt").values()]
    return [find_text(WIKITEXT2)] if request.tasks is None else []


class _Evaluation(Measurement):
    """One run over all tasks and texts."""

    request: EvalRequest
    may_stay_on_disk = True

    def __init__(self, request: EvalRequest) -> None:
        super().__init__(request)
        if request.answers is not None and request.answers.exists() and not request.answers.is_dir():
            raise CutError(f"answers={request.answers} is a file; specify a folder")
        self.vocabulary = self.model.vocabulary()
        self.tokenizers = {subject.weights: subject.tokenizer() for subject in self.subjects}
        self.tasks, texts = _resolve(request, self.store.metrics)
        self.store.bounds = request.require
        self.texts = [(text, *self._split_text(text)) for text in texts]
        self.settings = {"batch_size": request.batch_size, "chat_template": False}
        self.settings |= {"limit": request.limit} if request.limit is not None else {}
        check_media_tasks(self.tasks, self.subjects[::-1], request.num_fewshot)

    def _split_text(self, text: Text) -> tuple[torch.Tensor, dict[str, Any]]:
        """A text as windows, and the settings to record with their results."""
        requested = self.request.length
        length = min(resolve_length(one.config(), requested, DEFAULT_LENGTH, "length") for one in self.subjects)
        tokenizer = self.tokenizers[self.model.weights]
        rows, begun = split_windows(text.text, tokenizer, length, self.request.windows, text.name)
        if self.vocabulary is not None and (highest := int(rows.max())) >= self.vocabulary:
            raise LayerPruneError(
                f"the tokenizer produces token {highest}, but the model has a vocabulary of {self.vocabulary}; use the "
                "model's own tokenizer"
            )
        if self.base is not None:
            check_same_vocabulary((self.vocabulary, self.base.vocabulary()), (self.model.name, self.base.name))
            check_same_tokens(tokenizer, self.tokenizers[self.base.weights], text.text)
        return rows, {"length": length, "windows": len(rows), "starts_with_bos": begun}

    def run(self) -> None:
        """Measure everything."""
        live: Any = self.load(self.model)
        ours, dense = self._run_tasks(self.model, live), None
        if self.base is not None:
            if not self.texts:
                live = None  # without texts, the two need not be in memory together
            dense = self.load(self.base)
            theirs = self._run_tasks(self.base, dense)
            for name, run in ours.items():
                for metric in run.scores:
                    if metric in theirs[name].scores:
                        self._compare_scores(name, metric, run, theirs[name])
        for text, rows, settings in self.texts:
            self._measure_text(text, live, dense, rows, settings)

    # --- tasks ----------------------------------------------------------------------------------------------

    def _run_tasks(self, subject: Subject, model: PreTrainedModel) -> dict[str, TaskRun]:
        harnesses: dict[bool, TaskRunner] = {}
        runs = {}
        for name, task in self.tasks.items():
            folder = self.request.answers
            file = answers_file(folder, self._cache_key(subject, name, task)) if folder else None
            run = load_answers(file) if file else None
            if run is None:
                if (images := is_multimodal_task(task)) not in harnesses:
                    harnesses[images] = self._harness(subject, model, images)
                logger.info("%s: running the task %s", subject.name, name)
                run = harnesses[images].run(name, task, limit=self.request.limit, shots=self.request.num_fewshot)
                if file:
                    save_answers(file, run)
            runs[name] = run
            self.store.add(results=self._task_results(subject, name, run))
        return runs

    def _harness(self, subject: Subject, model: PreTrainedModel, images: bool) -> TaskRunner:
        """The harness for tasks of text, or for those about images."""
        from .harness import Harness, ImageHarness

        if images:
            return ImageHarness(model, subject.processor(), self.request.batch_size)
        return Harness(model, self.tokenizers[subject.weights], self.request.batch_size)

    def _cache_key(self, subject: Subject, name: str, task: TaskDict) -> dict[str, Any]:
        """Everything that the answers depend on."""
        from .harness import prompts_hash

        return {
            "weights": subject.weights,
            "identity": subject.identity.parts,
            "task": name,
            "prompts": prompts_hash(name, task, self.request.limit, self.request.num_fewshot),
            "batch_size": self.request.batch_size,
            "versions": {name: self.store.versions.get(name) for name in ("lm-eval", "transformers", "torch")},
            **self.placements[subject.weights],
        }

    def _task_results(self, subject: Subject, name: str, run: TaskRun) -> list[dict[str, Any]]:
        details = {
            "task": name,
            "samples": run.samples,
            "shots": run.shots,
            "seed": SEED,
            "task_version": run.version,
            "dataset": task_dataset(self.tasks[name]),
            "seconds": round(run.seconds, 3),
        }
        results = []
        for metric, score in run.scores.items():
            known = {"stderr": score.stderr, "higher_is_better": score.higher_is_better, "chance": score.chance}
            kind = "text" if metric in _TEXT_METRICS else "accuracy"
            results.append(self.result(subject.weights, kind, metric, score.value, self.settings, **known, **details))
        return results

    def _compare_scores(self, name: str, metric: str, ours: TaskRun, theirs: TaskRun) -> None:
        mine, other = ours.scores[metric], theirs.scores[metric]
        if mine.outcomes and mine.outcomes.keys() == other.outcomes.keys():
            theirs_in_order = [other.outcomes[question] for question in mine.outcomes]
            difference = compare_pairs(list(mine.outcomes.values()), theirs_in_order, mine.chance)
        else:
            difference = compare_values(mine.value, other.value)
        kind = "text" if metric in _TEXT_METRICS else "accuracy"
        self.compare(kind, metric, self.settings, difference, task=name)

    # --- texts ----------------------------------------------------------------------------------------------

    def _measure_text(
        self,
        text: Text,
        model: PreTrainedModel,
        base: PreTrainedModel | None,
        rows: torch.Tensor,
        settings: dict[str, Any],
    ) -> None:
        from .distance import mean, text_metrics, window_means

        logger.info("%s: measuring the text %s", self.model.name, text.name)
        start = perf_counter()
        with boundary(f"{text.name} can't be measured", kind=LayerPruneError):
            found = window_means(model, rows, base)
        details = {"task": text.name, "dataset": text.dataset, "samples": rows.numel() - len(rows)}
        details["seconds"] = round(perf_counter() - start, 3)
        ours = text_metrics(found["nll"])
        numbers = [(self.model, "text", ours)]
        if self.base is not None:
            theirs = text_metrics(found["base_nll"])
            distances = {metric: mean(found[metric]) for metric in ("kl", "top1_agreement")}
            numbers += [(self.base, "text", theirs), (self.model, "distance", distances)]
        self.store.add(
            results=[
                self.result(subject.weights, kind, metric, value, settings, stderr=stderr, **details)
                for subject, kind, values in numbers
                for metric, (value, stderr) in values.items()
            ]
        )
        if self.base is not None:
            nll = compare_pairs(found["nll"].tolist(), found["base_nll"].tolist())
            ratio = compare_values(ours["perplexity"][0], theirs["perplexity"][0])
            self.compare("text", "nll", settings, nll, task=text.name)
            self.compare("text", "perplexity", settings, ratio, task=text.name)
