"""The benchmarks: what each is called, what its items look like, where they lie, and the suites that boards
ask for."""

from dataclasses import dataclass

from msgspec import Struct

from ant5m.eval import schemas


@dataclass(frozen=True)
class Benchmark:
    """One row of the table."""

    name: str
    """lm-eval's name of the task, or ours where lm-eval does not have it"""
    schema: type[Struct]
    """of an item"""
    folder: str = ""
    """of lm-eval's definition, below lm_eval/tasks; empty: scored by a protocol of `ant5m.eval.tasks`"""
    files: tuple[str, ...] = ()
    """what the names of its files or folders begin with, the best first; default: `name`"""
    split: str = ""
    """where lm-eval does not say it"""
    hub: str = ""
    """data set, where lm-eval does not say it: "OWNER/NAME" or "OWNER/NAME CONFIG"; empty: only files"""
    published: float | None = None
    """percent, of the published Ant-5M"""
    parts: bool = False
    """whether it is the mean of parts, in which all parts weigh the same"""
    accuracy: bool = True
    """whether it has one"""
    all_files: bool = False
    """whether its items are in several files, whose names say the part"""


_LM_EVAL = (
    Benchmark("boolq", schemas.BoolQ, "super_glue/boolq"),
    Benchmark("copa", schemas.Copa, "super_glue/copa"),
    Benchmark("blimp", schemas.MinimalPair, "blimp", published=50.8, parts=True),
    Benchmark("winogrande", schemas.WinoGrande, "winogrande"),
    Benchmark("truthfulqa_mc2", schemas.TruthfulQa, "truthfulqa", ("truthful",)),
    Benchmark("piqa", schemas.Piqa, "piqa", ("piqa", "physicaliqa"), published=48.9),
    Benchmark("openbookqa", schemas.OpenBookQa, "openbookqa"),
    Benchmark("arc_easy", schemas.Arc, "arc", published=26.4),
    Benchmark("arc_challenge", schemas.Arc, "arc"),
    Benchmark("hellaswag", schemas.HellaSwag, "hellaswag"),
    Benchmark("swag", schemas.Swag, "swag"),
    Benchmark("mmlu", schemas.Mmlu, "mmlu/default", parts=True),
    Benchmark("race", schemas.Race, "race"),
    Benchmark("sciq", schemas.SciQ, "sciq", published=20.7),
    Benchmark("commonsense_qa", schemas.CommonsenseQa, "commonsense_qa"),
    Benchmark(
        "lambada_openai", schemas.Passage, "lambada", ("lambada_openai", "lambada_test"), published=0.0
    ),
    Benchmark("wikitext", schemas.Page, "wikitext", accuracy=False),
)

_OWN = (
    Benchmark(
        "ArithMark-3.0",
        schemas.ArithMark,
        files=("arithmark_3",),
        split="train",
        hub="AxiomicLabs/Arithmark-3.0",
    ),
    Benchmark(
        "ArithMark-2.0",
        schemas.ArithMark,
        files=("arithmark_2",),
        split="train",
        hub="AxiomicLabs/ArithMark-2.0",
    ),
    Benchmark(
        "glint_blimp", schemas.MinimalPair, files=("blimp",), split="train", all_files=True, parts=True
    ),
    Benchmark(
        "glint_arc_easy", schemas.Arc, files=("arc_easy",), split="test", hub="allenai/ai2_arc ARC-Easy"
    ),
    Benchmark(
        "glint_wikitext",
        schemas.Line,
        files=("wikitext",),
        split="test",
        hub="Salesforce/wikitext wikitext-2-raw-v1",
        accuracy=False,
    ),
    Benchmark(
        "babylm_blimp",
        schemas.MinimalPair,
        files=("blimp_filtered", "blimp_fast", "blimp"),
        all_files=True,
        parts=True,
    ),
    Benchmark(
        "babylm_supplement",
        schemas.MinimalPair,
        files=("supplement_filtered", "supplement_fast", "blimp_supplement", "supplement"),
        all_files=True,
        parts=True,
    ),
    Benchmark(
        "babylm_ewok",
        schemas.Ewok,
        files=("ewok_filtered", "ewok_fast", "ewok"),
        all_files=True,
        parts=True,
    ),
    Benchmark(
        "babylm_entity_tracking",
        schemas.EntityTracking,
        files=("entity_tracking", "entity_tracking_fast"),
        all_files=True,
        parts=True,
    ),
)

BENCHMARKS = {one.name: one for one in (*_LM_EVAL, *_OWN)}

SUITES = {
    "all": (*(one.name for one in _LM_EVAL), "ArithMark-3.0", "ArithMark-2.0"),
    "open-slm": ("hellaswag", "arc_easy", "arc_challenge", "piqa", "ArithMark-3.0", "ArithMark-2.0"),
    "glint": ("blimp", "arc_easy", "wikitext", "glint_blimp", "glint_arc_easy", "glint_wikitext"),
    "babylm": ("babylm_blimp", "babylm_supplement", "babylm_ewok", "babylm_entity_tracking"),
}
"""names that stand for several benchmarks"""
