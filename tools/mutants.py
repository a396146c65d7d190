"""Measures what the tests notice: plants small faults in the program, one at a time, and runs the tests on each.

    python -m tools.mutants                          all mutations of tests/mutants.txt (hours)
    python -m tools.mutants modeling/rpn.py          those of one module
    python -m tools.mutants modeling --jobs 1        those of a folder, one at a time

Mutations are planted in copies of the checkout, never in the checkout itself. A mutation is killed if its tests fail,
survives if they pass, and is undecided if they exceed their time (ten times what they take without a mutation), cannot
be collected, or fail without a mutation, too. Exits with 1 if less than 95 % of all mutations or 90 % of a module's are
killed. Mutations marked as equivalent change nothing that a caller can observe; they are counted, not run.

tests/mutants.txt has a block of lines per mutation, separated by empty lines; `#` begins a comment:

    module modeling/rpn.py                           applies to the mutations after it
    tests tests/modeling/test_rpn.py                 pytest's arguments; inside a block, those of one mutation

    - labels = picked >= 0                           the text to replace, which occurs once in the module; several lines
    + labels = picked > 0                            the text in its place; without such lines, nothing takes its place
    equivalent WHY                                   only if the mutation changes nothing: the reason
"""

import argparse
import collections
import contextlib
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
BAR, MODULE_BAR = 0.95, 0.90  # shares of the mutations that run
KILLED, SURVIVED, UNDECIDED = "killed", "survived", "undecided"
OUTCOMES = {0: SURVIVED, 1: KILLED}  # by pytest's exit code; others mean that the tests did not run
PATIENCE, SHORTEST = 5, 60  # a test's time: so many times the unmutated tests', at least this many seconds
LONGEST = 3600  # seconds for the unmutated tests


class MutantsError(Exception):
    """The list of mutations is wrong, or no mutation was chosen."""


@dataclass(frozen=True)
class Mutation:
    """One fault: in `module` (path relative to the root), `old` (occurs once) is replaced by `new`."""

    module: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest
    line: int  # of the list, for messages
    equivalent: str | None = None  # the reason

    def apply(self, source: str) -> str:
        """Returns the mutated source. Raises MutantsError if `old` does not occur exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise MutantsError(f"line {self.line}: text occurs {count} times in {self.module}, not once: {self.old!r}")
        return source.replace(self.old, self.new)

    def __str__(self):
        removed = "\n".join(f"    - {line}" for line in self.old.split("\n"))
        added = "\n".join(f"    + {line}" for line in self.new.split("\n")) if self.new else "    +"
        return f"{self.module} (line {self.line} of the list)\n{removed}\n{added}"


def read_mutations(path: Path) -> list[Mutation]:
    """Reads a list of mutations; the module's docstring describes the format. Raises MutantsError."""
    mutations, module, tests = [], None, ()
    for start, block in _blocks(path):
        fields = _read_block(block, start)
        if "-" not in fields:
            module, tests = fields.get("module", module), fields.get("tests", tests if "module" not in fields else ())
            continue
        if module is None or not fields.get("tests", tests):
            raise MutantsError(f"{path}, line {start}: no module or no tests are named before this mutation")
        mutation = Mutation(module, fields["-"], fields.get("+", ""), fields.get("tests", tests), start)
        mutations.append(replace(mutation, equivalent=fields.get("equivalent")))
    return mutations


def _blocks(path):
    """Yields (number of the first line, lines) of each block, without comments."""
    block, start = [], 1
    for number, line in enumerate([*path.read_text().split("\n"), ""], 1):
        if line.strip():
            if not line.startswith("#"):
                start = start if block else number
                block.append(line)
        elif block:
            yield start, block
            block = []


def _read_block(block, start):
    """Returns the fields of a block by keyword: text, or a tuple of pytest's arguments."""
    fields = collections.defaultdict(list)
    for number, line in enumerate(block, start):
        keyword, _, text = line.partition(" ")
        if keyword not in ("module", "tests", "-", "+", "equivalent") or (keyword == "equivalent" and not text.strip()):
            raise MutantsError(f"line {number}: neither module, tests, -, + nor equivalent with a reason: {line!r}")
        fields[keyword].append(text)
    joined = {keyword: "\n".join(lines) for keyword, lines in fields.items()}
    if "tests" in joined:
        joined["tests"] = tuple(shlex.split(joined["tests"]))
    return joined


def choose(mutations: list[Mutation], modules: list[str]) -> list[Mutation]:
    """Returns the mutations of the named modules and folders, all if none is named. Raises MutantsError."""
    unknown = [m for m in modules if not any(_is_of(mutation, m) for mutation in mutations)]
    if unknown:
        raise MutantsError(f"no mutation of {', '.join(unknown)}: name a file or folder of the list")
    return [m for m in mutations if not modules or any(_is_of(m, name) for name in modules)]


def _is_of(mutation, name):
    return Path(name) in [Path(mutation.module), *Path(mutation.module).parents]


# ---------------------------------------------------------------- running


def copy_checkout(root: Path, folder: Path) -> Path:
    """Copies the files that git tracks or would add; returns the copy's folder."""
    command = ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


@contextlib.contextmanager
def planted(mutation: Mutation, folder: Path):
    """The mutation stands in the copy while the block runs.

    Its file gets a time of its own: Python trusts a compiled file by the source's time and size, which often are equal.
    """
    path = folder / mutation.module
    source, times = path.read_text(), path.stat()
    path.write_text(mutation.apply(source))
    os.utime(path, (times.st_mtime + 10 + mutation.line,) * 2)
    try:
        yield
    finally:
        path.write_text(source)
        os.utime(path, (times.st_atime, times.st_mtime))


def run_tests(folder: Path, tests: tuple[str, ...], *, seconds: float, caches: bool = False) -> int | None:
    """Runs pytest in a folder up to its first failure.

    Args:
        seconds: after which a test fails, even within TensorFlow; all together have twice that
        caches: keep compiled files for later runs
    Returns:
        pytest's exit code, None after twice `seconds`. No process that it started is left.
    """
    environment = {**os.environ, **({} if caches else {"PYTHONDONTWRITEBYTECODE": "1"})}
    environment.setdefault("RCNN_COCO_TINY", str(ROOT.parent / "shared" / "coco_tiny"))
    limit = [f"--timeout={seconds}", "--timeout-method=thread"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *limit, *tests]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet) as process:
        try:
            return process.wait(2 * seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class Runner:
    """Runs mutations in copies of the checkout, one per job."""

    def __init__(self, root: Path, folder: Path, *, jobs: int):
        self._copies = queue.SimpleQueue()
        for number in range(jobs):
            self._copies.put(copy_checkout(root, folder / str(number)))
        self._jobs, self._durations = jobs, {}

    def measure(self, tests):
        """Runs tests without a mutation. Returns the seconds they take, None if they fail."""
        with self._copy() as folder:
            start = time.monotonic()
            passed = run_tests(folder, tests, seconds=LONGEST, caches=True) == 0
        return time.monotonic() - start if passed else None

    def judge(self, mutation):
        """Returns the outcome of one mutation: KILLED, SURVIVED or UNDECIDED. Prints a mutation that is not killed."""
        duration, code = self._durations[mutation.tests], None
        if duration is not None:
            with self._copy() as folder, planted(mutation, folder):
                code = run_tests(folder, mutation.tests, seconds=max(SHORTEST, PATIENCE * duration))
        outcome = OUTCOMES.get(code, UNDECIDED)
        if outcome != KILLED:
            tqdm.write(f"{outcome}: {mutation}")
        return outcome

    def run(self, mutations):
        """Returns the outcomes of the mutations, in their order."""
        tests = list(dict.fromkeys(m.tests for m in mutations))
        durations = self._map(self.measure, tests, "without mutations")
        self._durations = dict(zip(tests, durations))
        for selection in [t for t, duration in self._durations.items() if duration is None]:
            tqdm.write(f"fail without a mutation: {' '.join(selection)}")
        return self._map(self.judge, mutations, "mutations")

    def _map(self, function, items, title):
        """Returns the function's results, in order, of all jobs together. An interruption drops those not begun."""
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                return list(tqdm(pool.map(function, items), title, len(items)))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @contextlib.contextmanager
    def _copy(self):
        folder = self._copies.get()
        try:
            yield folder
        finally:
            self._copies.put(folder)


# ---------------------------------------------------------------- report


def share_killed(counts) -> float:
    """Returns the share of mutations killed, of those that ran; 1 if none ran."""
    ran = counts[KILLED] + counts[SURVIVED] + counts[UNDECIDED]
    return counts[KILLED] / ran if ran else 1.0


def report(mutations: list[Mutation], outcomes: list[str]) -> tuple[str, bool]:
    """Returns the table by module, and whether the bars are met. `outcomes`: of the mutations not equivalent."""
    counts = collections.defaultdict(collections.Counter)
    remaining = iter(outcomes)
    for mutation in mutations:
        counts[mutation.module]["equivalent" if mutation.equivalent else next(remaining)] += 1
    columns = (KILLED, SURVIVED, UNDECIDED, "equivalent")
    total = sum(counts.values(), collections.Counter())
    rows = [(name, *(c[x] for x in columns), share_killed(c)) for name, c in [*sorted(counts.items()), ("all", total)]]
    is_met = share_killed(total) >= BAR and all(share_killed(c) > MODULE_BAR for c in counts.values())
    return tabulate(rows, ["module", *columns, "share killed"], floatfmt=".3f"), is_met


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.mutants", description="Plants faults and runs the tests on each.")
    parser.add_argument("modules", nargs="*", help="files or folders of the list; default: all")
    parser.add_argument("--list", type=Path, default=ROOT / "tests" / "mutants.txt", help="default: tests/mutants.txt")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations at a time; default: all cores")
    return parser.parse_args(arguments)


def main(arguments: list[str], *, root: Path = ROOT) -> int:
    """Runs the command line. Returns the exit code: 0 if the bars are met, 1 if not, 2 if nothing could be run."""
    args = parse(arguments)
    try:
        mutations = choose(read_mutations(args.list), args.modules)
        for mutation in mutations:
            mutation.apply((root / mutation.module).read_text())
    except (MutantsError, OSError) as e:
        print(f"tools.mutants: {e}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        outcomes = Runner(root, Path(folder), jobs=max(args.jobs, 1)).run([m for m in mutations if not m.equivalent])
    table, is_met = report(mutations, outcomes)
    print(table)
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
