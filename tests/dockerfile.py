"""Build an image from a Dockerfile without a container engine: every step is done for real, in a chroot.

Of the Dockerfile reference (docs.docker.com/reference/dockerfile) what our file uses: several stages, ARG
before them, COPY with ``--from`` and ``--chmod``, shell forms. What the first steps of a stage do is kept for
the next build, as an engine does, up to the first one that copies a directory; all others are done each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from tests.debian import BUILD

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

ENTER = """
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
cat /etc/resolv.conf > "$ROOT/etc/resolv.conf"
for path in $BOUND; do
  if test -d "$path"; then mkdir -p "$ROOT$path"; else mkdir -p "$ROOT${path%/*}"; touch "$ROOT$path"; fi
  mount --bind "$path" "$ROOT$path"
done
mkdir "$ROOT/.old"
cd "$ROOT"
pivot_root . .old
umount --lazy /.old
rmdir /.old
exec env --ignore-environment --chdir="$WORKDIR" "$@"
"""
"""Goes into an image, as an engine does: with devices and processes, and the names of the network.

Nothing else of this machine stays mounted: a mount that another test takes away could not end.
"""


@dataclass
class Stage:
    """What one FROM begins: `image` is the name of an image, `steps` are (instruction, arguments)."""

    image: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages(recipe: str) -> list[Stage]:
    """Return the stages of the Dockerfile `recipe`, with the defaults of its ARGs before them."""
    text = re.sub(r"^\s*#.*\n", "", recipe, flags=re.MULTILINE).replace("\\\n", " ")
    arguments: dict[str, str] = {}
    found: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            found.append(Stage(Template(image).substitute(arguments), name or str(len(found))))
        elif found:
            found[-1].steps.append((word, " ".join(rest.split())))
        else:
            name, _, value = rest.partition("=")
            arguments[name] = value
    return found


@dataclass
class Image:
    """A root directory and what an engine needs to know to run something in it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    """The ARGs of its last stage: variables of its RUNs alone."""
    workdir: str = "/"
    labels: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def words(self, *command: str, env: dict[str, str] | None = None, bound: Sequence[str] = ()) -> list[str]:
        """Return the words that run `command` in the image, in namespaces of its own that see ours."""
        inside = [f"{name}={value}" for name, value in {**self.env, **(env or {})}.items()]
        told = {"ROOT": self.root, "BOUND": " ".join(bound), "WORKDIR": self.workdir}
        return [
            "env",
            *(f"{name}={value}" for name, value in told.items()),
            *("unshare", "--mount", "--propagation=slave", "sh", "-euc", ENTER, "sh"),
            *inside,
            *command,
        ]


@dataclass(frozen=True)
class Network:
    """How programs reach package mirrors from here: variables, and files and directories they need."""

    env: dict[str, str]
    bound: tuple[str, ...]


def network() -> Network:
    """Return how apt and pip reach their mirrors on this machine."""
    wanted = re.compile(r"PIP_.*|.*_(proxy|PROXY)|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE")
    env = {name: value for name, value in os.environ.items() if wanted.fullmatch(name)}
    settings = [Path("/etc/pip.conf"), Path("~/.pip/pip.conf"), Path("~/.config/pip/pip.conf")]
    files = [file for file in (path.expanduser() for path in settings) if file.exists()]
    named = " ".join([*env.values(), *(file.read_text() for file in files)])
    paths = {Path(path) for path in re.findall(r"(?:^|[\s=:]|file://)(/[\w./-]+)", named)}
    paths = {path.parent if path.name == "simple" else path for path in paths}  # an index, beside its files
    return Network(env, tuple(str(path) for path in sorted({*files, *paths}) if path.exists()))


@contextmanager
def built(recipe: Path, bases: Mapping[str, Sequence[Path]]) -> Iterator[Image]:
    """Yield the image of the last stage of the file `recipe`, whose directory is the context; removed then.

    `bases` are the images that it begins with: directories that lie on one another, the topmost first.
    """
    reached = network()
    images: dict[str, Image] = {}
    with ExitStack() as stack:
        for stage in stages(recipe.read_text()):
            context, base = recipe.parent, bases[stage.image]
            first = next(n for n, step in enumerate(stage.steps) if None in _copied(step, context))
            lower = [layer(stage.steps[:first], base, context), *base]
            image = images[stage.name] = Image(stack.enter_context(_overlay(lower)))
            for number, (word, rest) in enumerate(stage.steps):
                if word not in ("RUN", "COPY") or number >= first:
                    _step(image, word, rest, context, images, reached)
        yield image


def layer(steps: Sequence[tuple[str, str]], base: Sequence[Path], context: Path) -> Path:
    """Return what `steps`, which copy files from `context`, change in `base`; made once for each of these."""
    copied = [digest for step in steps for digest in _copied(step, context)]
    key = hashlib.sha256(json.dumps([*map(str, base), *steps, copied]).encode()).hexdigest()[:16]
    kept = BUILD / f"layer-{key}"
    if not kept.exists():
        unfinished = kept.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with _overlay(base, upper=unfinished) as root:
            image, reached = Image(root), network()
            for word, rest in steps:
                _step(image, word, rest, context, {}, reached)
        unfinished.rename(kept)
    return kept


def _copied(step: tuple[str, str], context: Path) -> list[str | None]:
    """Return digests of the files that a step copies; None for a directory, and for what a stage made."""
    words = shlex.split(step[1]) if step[0] == "COPY" else []
    sources = [None if "--from=" in step[1] else context / word for word in words[:-1] if word[:2] != "--"]
    return [
        hashlib.sha256(source.read_bytes()).hexdigest() if source and source.is_file() else None
        for source in sources
    ]


def _step(
    image: Image, word: str, rest: str, context: Path, images: dict[str, Image], network: Network
) -> None:
    """Do one step."""
    match word:
        case "RUN":
            env = {**image.arguments, **network.env}
            words = image.words("/bin/sh", "-c", rest, env=env, bound=network.bound)
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        case "WORKDIR":
            image.workdir = rest
            _inside(image.root, rest).mkdir(parents=True, exist_ok=True)
        case "COPY":
            _copy(image, shlex.split(rest), context, images)
        case "ENV":
            image.env |= _pairs(rest, image.env)
        case "ARG":
            image.arguments |= _pairs(rest, {})
        case "LABEL":
            image.labels |= _pairs(rest, image.arguments)
        case "HEALTHCHECK":
            image.healthcheck = json.loads(rest.partition("CMD ")[2])
        case "CMD":
            image.command = json.loads(rest)
        case _:
            raise AssertionError(f"{word} is not known here: add it")


def _pairs(text: str, env: dict[str, str]) -> dict[str, str]:
    pairs = (word.partition("=") for word in shlex.split(text))
    return {name: Template(value).substitute(env) for name, _, value in pairs}


def _copy(image: Image, words: list[str], context: Path, images: dict[str, Image]) -> None:
    options = dict(word[2:].split("=") for word in words if word.startswith("--"))
    *sources, target = (word for word in words if not word.startswith("--"))
    place = _inside(image.root, os.path.join(image.workdir, target))
    origin = images[options["from"]].root if "from" in options else context
    for source in (_inside(origin, name) for name in sources):
        if source.is_dir():  # its content, not itself
            place.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "--archive", f"{source}/.", place], check=True)
            continue
        file = place / source.name if target.endswith("/") else place
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, file)
        if "chmod" in options:
            file.chmod(int(options["chmod"], 8))


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/").removeprefix("./")


@contextmanager
def _overlay(lower: Sequence[Path], *, upper: Path | None = None) -> Iterator[Path]:
    """Yield the directories of `lower`, the first one on top, as one that can be written to."""
    with ExitStack() as stack:
        place = BUILD / f"image-{os.getpid()}-{os.urandom(4).hex()}"
        place.mkdir(parents=True)
        stack.callback(shutil.rmtree, place)
        root, work = place / "root", place / "work"
        upper = upper or place / "upper"
        for directory in (root, work, upper):
            directory.mkdir(exist_ok=True)
        lowers = ":".join(map(str, lower))
        options = f"lowerdir={lowers},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", root], check=True)
        yield root
