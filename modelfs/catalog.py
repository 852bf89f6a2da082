"""The models of a mount: resolved, shown, refreshed, found on demand."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import trio

from modelfs import __version__
from modelfs.archives import Limits
from modelfs.cache import Cache
from modelfs.errors import BadAnswer, ConfigError, NotFound, StoreError
from modelfs.faces import Faces
from modelfs.fetch.breaker import Breaker
from modelfs.fetch.chain import answering, same_content
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.scrub import Subject
from modelfs.fetch.source import Source, chained, retrying
from modelfs.fetch.unpack import Archive
from modelfs.files import Files
from modelfs.layouts import Holder, arrange, artifacts, repository
from modelfs.listing import Line
from modelfs.lockfile import Lock
from modelfs.lookups import Lookups
from modelfs.metrics import Metrics
from modelfs.model import Model
from modelfs.namespaces import NAMESPACES, Names, Repositories, path_in, permits
from modelfs.pins import Pins
from modelfs.records import Records
from modelfs.stores import Options, Store, identity_of, open_store
from modelfs.tree import (
    METADATA,
    Branch,
    Change,
    Directory,
    Folder,
    Node,
    Text,
    Tree,
    difference,
    grow,
    inode,
    leaf,
    metadata,
    numbers,
)
from modelfs.types import PicklePolicy, Snapshot, entry_fault
from modelfs.unpacked import Archives, Image
from modelfs.views import Face, ollama
from modelfs.views.filters import shows
from modelfs.views.hub import PLACE, folder_of, repositories, revision_in

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 60.0
"""How long resolving a model is retried before the mount says that it cannot be resolved."""

PATIENCE = 3.0
"""Seconds a start waits for a store before it goes on without the model."""

CONFIRM_SECONDS = 0.3
"""Seconds a start waits for a store before it goes on with the snapshot on disk."""

RETRY_SECONDS = 15.0
"""How often an unavailable model is tried again."""

PARALLEL = 8
"""Most models resolved at the same time."""


@dataclass(frozen=True)
class _Entries:
    """Resolver of a directory of a store too large to list."""

    model: Model
    prefix: str


class Catalog:
    """All models of one mount, and the tree that shows them.

    Args:
        tree: what is changed when models come and go.
        cache: where snapshots are kept.
        fetcher: the fetch path for contents.
        metrics: what is counted.
        options_for: the configured options for a store URL.
        changed: called in the trio thread with the names that the kernel must look up anew.
        lock: what every model must be; None if they may be anything.
        pickles: what becomes of suspicious pickles in models that are found on demand.
        limits: what no archive that is shown as a directory may exceed.

    """

    def __init__(
        self,
        tree: Tree,
        cache: Cache,
        fetcher: Fetcher,
        metrics: Metrics,
        options_for: Callable[[str], Options],
        changed: Callable[[list[Change]], None],
        lock: Lock | None = None,
        pickles: PicklePolicy = "allow",
        limits: Limits | None = None,
    ) -> None:
        self.tree = tree
        self.models: dict[str, Model] = {}
        self.files = Files(cache, fetcher)
        self._fetcher = fetcher
        self._metrics = metrics
        self._options_for = options_for
        self._changed = changed
        self._faces = Faces(cache, fetcher, lock)
        self._records = Records(cache, self._faces)
        self._pins = Pins(cache, self.models)
        self._pickles = pickles
        self._namespaces: list[str] = []
        self._archives = Archives(fetcher, cache, limits or Limits(), self._unpacked)
        self._lookups = Lookups()
        self._slots = trio.CapacityLimiter(PARALLEL)
        self._hub = Folder(inode(PLACE, "", "path"), listed=False)
        tree.put((PLACE,), self._hub)
        tree.put((ollama.PLACE,), Folder(inode(ollama.PLACE, "", "path"), listed=False))
        self._breakers: WeakValueDictionary[str, Breaker] = WeakValueDictionary()
        metrics.model_states.read = self._states

    # -- models ----------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        url: str,
        options: Options,
        *,
        fallbacks: Sequence[tuple[str, Options]] = (),
        optional: bool = False,
        pinned: bool = False,
        pickles: PicklePolicy | None = None,
        face: Face | None = None,
    ) -> Model:
        """Add a model that is still to be resolved; what is cached of a `pinned` one is not evicted.

        Args:
            name: its path in the tree.
            url: of its store.
            options: of its store.
            fallbacks: URL and options of each store that answers when those before it do not.
            optional: the mount goes on without it.
            pinned: what is cached of it stays.
            pickles: what becomes of suspicious ones; None for what the mount says.
            face: how it is shown.

        Raises:
            ConfigError: the URL or an option is wrong.

        """
        stores = [open_store(*each) for each in ((url, options), *fallbacks)]
        face = face or Face()

        async def show(source: Source, listed: Snapshot) -> Snapshot:
            return await self._faces.shown(name, source, face, listed)

        source = chained([Source(store, self._metrics, self._breaker(store), show) for store in stores])
        model = Model(name, source, optional, pinned, name in self._pins.names, face=face)
        model.pickles = pickles or self._pickles
        own = name if name.partition("/")[0] not in NAMESPACES else ""
        if own or "@" not in name:  # who names no revision shall not get one that somebody else looked up
            alone = model.face.layout == "hub"
            model.repositories = repositories(own, *(store.url for store in stores), alone=alone)
        self.models[name] = model
        return model

    def _breaker(self, store: Store) -> Breaker:
        """Return the one breaker of the store, whichever model it is of."""
        identity = identity_of(store)
        breaker = self._breakers.get(identity)
        if breaker is None:
            gauge = partial(self._metrics.note_breaker, store.url)
            breaker = self._breakers[identity] = Breaker(trio.current_time, changed=gauge)
        return breaker

    def add_namespace(self, pattern: str) -> None:
        """Show the on-demand namespace of `pattern`, one of `NAMESPACES`, and find what it `permits`."""
        name = pattern.partition("/")[0]
        if not any(known.partition("/")[0] == name for known in self._namespaces):
            self.tree.put((name,), Folder(inode(name, "", "namespace"), resolver=NAMESPACES[name]))
        if name == "hf":
            self._hub.resolver = Repositories(name)
        self._namespaces.append(pattern)

    async def start(self, nursery: trio.Nursery, *, keep_going: bool, at_once: bool = False) -> None:
        """Resolve all models and show them; return when each is ready or may be missing.

        A model that may be missing is retried for `PATIENCE` seconds only, and later by `run`. One with a
        snapshot on disk waits `CONFIRM_SECONDS` for its store; with `at_once` not at all, and what was found
        on demand is shown again: the kernel knows the nodes of these snapshots.

        Raises:
            StoreError: a model that is not optional cannot be resolved and has no snapshot on disk; the
                message names it.

        """
        nursery.start_soon(self.files.run)
        patience = 0.0 if at_once else CONFIRM_SECONDS
        await self._pins.load()
        found = await self._records.found() if at_once else {}
        await self._find_again({**self._pins.names, **found})
        await self._records.note_found(self.models)
        async with trio.open_nursery() as starting:
            for model in list(self.models.values()):
                seconds = PATIENCE if model.optional or keep_going else RESOLVE_SECONDS
                starting.start_soon(self._begin, nursery, model, patience, seconds)
        for model in self.models.values():
            if model.state == "unavailable" and not (model.optional or keep_going):
                raise StoreError(
                    f"model {model.name}: {model.why} (optional: true or --keep-going mounts without it)"
                )
        self._publish([])
        await self._pins.hold()
        if at_once:
            await self._expect()

    async def run(self, every: float) -> None:
        """Refresh all models every `every` seconds (0: never), unavailable ones more often; never returns."""
        due = trio.current_time() + (every or math.inf)
        while True:
            await trio.sleep(min(RETRY_SECONDS, max(0.0, due - trio.current_time())))
            everything = trio.current_time() >= due
            if everything:
                due = trio.current_time() + every
            await self._refresh_all(m for m in self.models.values() if everything or m.state != "ready")

    async def refresh(self, name: str | None = None) -> list[Model]:
        """Resolve one model, or all, at once; return those that were asked for.

        Raises:
            NotFound: there is no model of this name.

        """
        wanted = self.named(name)
        await self._refresh_all(wanted)
        return wanted

    def named(self, name: str | None = None) -> list[Model]:
        """Return the model `name`, or all; NotFound if there is none of this name."""
        if name is not None and name not in self.models:
            raise NotFound(f"no model {name!r}; mounted are: {', '.join(self.models) or 'none'}")
        return [self.models[name]] if name is not None else list(self.models.values())

    async def _refresh_all(self, models: Iterable[Model]) -> None:
        async with trio.open_nursery() as nursery:
            for model in list(models):
                nursery.start_soon(self._refresh, model)

    async def _refresh(self, model: Model) -> None:
        try:
            await self._resolve(model, seconds=0.0)
        except StoreError as error:
            self._note_failure(model, error)

    def _note_failure(self, model: Model, error: StoreError) -> None:
        # One line when the reason changes, not one a minute.
        log.log(logging.DEBUG if model.why == str(error) else logging.WARNING, "%s: %s", model.name, error)
        model.why = str(error)
        if model.snapshot is None:
            model.state = "unavailable"

    async def _begin(self, nursery: trio.Nursery, model: Model, patience: float, seconds: float) -> None:
        saved = await self._records.load(model)
        settled = trio.Event()

        async def resolve() -> None:
            try:
                await self._resolve(model, seconds=0.0 if saved else seconds)
            except StoreError as error:
                self._note_failure(model, error)
            finally:
                settled.set()

        if saved is None and patience:
            await resolve()
            return
        if patience:
            nursery.start_soon(resolve)
            with trio.move_on_after(patience):
                await settled.wait()
        if model.snapshot is None and saved is not None:
            await self._present_saved(model, *saved)
            if patience:
                why = model.why or "its store has yet to answer"
                level = logging.WARNING if model.why else logging.INFO
                log.log(level, "%s: using the snapshot on disk, %s", model.name, why)
            self._show(model)
        if not patience:
            self._changed(await self._records.untold(model))
            nursery.start_soon(resolve)

    async def _resolve(self, model: Model, *, seconds: float) -> None:
        """Ask the store for a snapshot, and show it if it is new; retry failures for `seconds`."""
        async with self._slots, model.lock:
            known = model.listed or model.source.snapshot  # shown, or on disk and about to be
            ask = partial(answering, model.source.chain, model.source if known else None)
            listed: Snapshot | None  # None: it is on the disk
            source, listed, snapshot = await retrying(ask, trio.current_time() + seconds)
            if source is not model.source and known is not None:
                if await trio.to_thread.run_sync(same_content, known, snapshot):  # no new inodes
                    source, listed, snapshot = model.source, None, known
                else:
                    log.warning("%s: %s answers now, not %s", model.name, source.url, model.source.url)
            is_for_ollama = await self._faces.is_for_ollama(source, snapshot)
            model.source, model.is_for_ollama = source, is_for_ollama
            model.why, model.state, model.offline = None, "ready", False
            model.resolved_at = time.time()
            shown = model.listed
            if shown is None or shown.revision != snapshot.revision or shown.entries != snapshot.entries:
                model.before = model.snapshot if model.repositories else None
                await self._present(model, snapshot)
                # First: a successor must know what the kernel has seen.
                await self._records.save(model, listed)
                log.info(
                    "%s: %s at %s, %d entries",
                    model.name,
                    snapshot.url,
                    snapshot.revision,
                    len(snapshot.entries),
                )
                for path, reason in model.snapshot.rejected if model.snapshot else ():
                    log.warning("%s: %r is not shown: %s", model.name, path, reason)
                await self._show_anew(model)

    async def _present(self, model: Model, snapshot: Snapshot) -> Snapshot:
        """Have `snapshot` shown the next time, and return it, with what is known of its archives."""
        shown, archives = await self._archives.unpacked(model.source, snapshot, model.face)
        model.listed, model.snapshot, model.archives = snapshot, shown, archives
        return shown

    async def _present_saved(self, model: Model, snapshot: Snapshot, resolved_at: float) -> None:
        """Have a snapshot from disk shown, until the store answers."""
        model.resolved_at = resolved_at
        shown = await self._present(model, snapshot)
        model.offline, model.state = True, "ready"
        await self._records.load_more(model, shown)

    async def _unpacked(self, source: Source) -> None:
        """Show what was found in an archive of `source`."""
        for model in [model for model in self.models.values() if model.source is source]:
            async with model.lock:
                if model.listed is not None:
                    await self._present(model, model.listed)
                    await self._show_anew(model)

    async def _show_anew(self, model: Model) -> None:
        """Show what is another in the model than before, and keep what it has now if it is pinned."""
        self._show(model, await self._differing(model))
        if model.stays:
            await self._pins.hold()

    async def pin(self, name: str) -> Model:
        """Keep what is cached of the model `name` from eviction, now and after every restart; return it.

        Raises:
            NotFound: there is no model of this name, nor is it found on demand.
            StoreError: the store failed to say so.

        """
        model = await self.look_up(name)
        await self._pins.add(model)
        return model

    async def unpin(self, name: str) -> None:
        """Undo `pin`; does nothing if the model is not pinned.

        Raises:
            NotFound: there is no model of this name.
            ConfigError: the configuration says that it is pinned.

        """
        if name not in self._pins.names:
            self.named(name)
        if name in self.models and self.models[name].pinned:
            raise ConfigError(
                f"model {name} is pinned by the configuration: remove pin there and mount again"
            )
        await self._pins.remove(name)

    async def _differing(self, model: Model) -> list[Change] | None:
        """Return what is another in the model's snapshot than in what is shown; None if nothing is shown."""
        node = self.tree.root.at(model.name.split("/"))
        if not isinstance(node, Branch) or model.snapshot is None:
            return None
        return await trio.to_thread.run_sync(
            difference, model.name, node.shown.listing, model.snapshot.listing
        )

    def _show(self, model: Model, differing: list[Change] | None = None) -> None:
        if model.snapshot is None:
            return
        node: Node
        folders = {folder_of(name): name for name in model.repositories if model.snapshot.complete}
        if not model.snapshot.complete:
            node = Folder(inode(model.name, "", "directory"), resolver=_Entries(model, ""))
        elif model.face.layout == "hub":
            holders = _holders([model])
            own = {folder: repository(f"{model.name}/{folder}", holders) for folder in folders}
            node = arrange(model.name, own)
        else:
            pending = {path: archive for path, archive in model.archives.items() if not archive.done}
            node = grow(model.name, model.snapshot, model, pending)
        changes = self.tree.put(tuple(model.name.split("/")), node, differing)
        for folder, name in folders.items():
            named = [other for other in self.models.values() if name in other.repositories]
            holders = _holders(sorted(named, key=lambda other: other.name != name))
            changes += self.tree.put((PLACE, folder), repository(f"{PLACE}/{folder}", holders))
        if ollama.manifest_of(model.source.url):
            held = [m for m in self.models.values() if m.is_for_ollama]
            found = artifacts([(m, m.source.url, m.snapshot) for m in held if m.snapshot is not None])
            changes += self.tree.put((ollama.PLACE, "models"), found)
        self._lookups.forget()
        self._publish(changes)

    async def _expect(self) -> None:
        """Answer for everything that an earlier daemon may have told the kernel."""
        for root in self.tree.branches():
            self.tree.expect(root, await trio.to_thread.run_sync(numbers, root))

    def _states(self) -> Iterable[tuple[str, str]]:
        """Return what the metrics say of the configured models; readers name as many others as they like."""
        for model in list(self.models.values()):
            if not model.on_demand:
                behind = model.state == "ready" and (model.why or model.offline)
                yield model.name, "unconfirmed" if behind else model.state

    def _publish(self, changes: list[Change]) -> None:
        rows = [
            {
                "name": model.name,
                "source": model.source.url,
                "revision": model.snapshot.revision,
                "files": len(model.snapshot.entries),
                "size": model.snapshot.size,
                "digest": model.snapshot.digest,
            }
            for model in self.models.values()
            if model.snapshot is not None
        ]
        content = metadata(f"modelfs {__version__}", rows)
        latest = max((model.resolved_at or 0.0 for model in self.models.values()), default=0.0)
        text = Text(inode("", METADATA, content.decode()), latest, content)
        self._changed(changes + self.tree.put((METADATA,), text))

    async def recall(self, inos: set[int]) -> None:
        """Let the tree know nodes again that left it before this process began, as far as they are on disk.

        The kernel may have files of the snapshot before the present one open.
        """
        for model in self.models.values():
            missing = {ino for ino in inos if self.tree.node(ino) is None}
            if missing:
                for node in await self._records.past(model, missing):
                    self.tree.remember(node)

    async def _find_again(self, found: Mapping[str, str]) -> None:
        """Add models that were found on demand before this process began: path → URL."""
        for path, url in found.items():
            if path in self.models or not permits(self._namespaces, path):
                continue
            directory = self.tree.root
            for parent in path.split("/")[:-1]:
                child = directory.children.get(parent) or await self._find(directory, parent)
                if not isinstance(child, Folder):
                    break
                directory = child
            else:
                self.add(path, url, self._options_for(url), optional=True).on_demand = True

    async def look_up(self, name: str) -> Model:
        """Return the model `name`, found on demand if need be.

        Raises:
            NotFound: there is none of this name.
            StoreError: the store failed to say whether there is.

        """
        node: Node | None = self.tree.root
        for part in name.split("/") if name not in self.models else ():
            if not isinstance(node, Directory):
                break
            node = node.children.get(part) or await self.find(node, part)
        return self.named(name)[0]

    # -- on demand -------------------------------------------------------------------------------------

    async def find(self, parent: Directory, name: str) -> Node | None:
        """Return the child `name` of a directory with a resolver; one store call serves all who ask.

        Raises:
            StoreError: the store failed to say whether there is such a name.

        """
        if isinstance(parent, Branch):
            return await self._find_member(parent, name)
        if not isinstance(parent, Folder):
            return None
        if not isinstance(parent.resolver, _Entries):
            path = path_in(parent.resolver, name)
            if path is None or not permits(self._namespaces, path):
                return None
        known = partial(parent.children.get, name)
        return await self._lookups.ask((parent.ino, name), known, partial(self._find, parent, name))

    async def _find(self, parent: Folder, name: str) -> Node | None:
        match parent.resolver:
            case Names(path, url, ""):
                return await self._find_model(parent, name, f"{path}/{name}", f"{url}{name}")
            case Names() as above:
                resolver = above.below(name)
                node = Folder(inode(resolver.path, "", "path"), parent.mtime, resolver=resolver)
                return self.tree.adopt(parent, name, node)
            case Repositories(namespace):
                below: Node | None = self.tree.root.children[namespace]
                for part in name.split("--")[1:]:
                    below = await self.find(below, part) if isinstance(below, Directory) else None
                return parent.children.get(name)
            case _Entries(model, _):
                return await self._find_entry(parent, name, model)
            case unknown:
                raise TypeError(f"not a resolver: {unknown!r}")

    async def _find_model(self, parent: Folder, name: str, path: str, url: str) -> Node | None:
        if url.startswith("s3://"):
            url += "/"
        try:
            model = self.models.get(path) or self.add(path, url, self._options_for(url), optional=True)
        except ConfigError as error:  # no store has a model of such a name
            raise NotFound(str(error)) from error
        model.on_demand = True
        try:
            await self._resolve(model, seconds=0.0)
        except NotFound:
            del self.models[path]
            raise
        except StoreError as error:
            saved = await self._records.load(model)
            if saved is None:
                del self.models[path]
                raise
            model.why = str(error)
            await self._present_saved(model, *saved)
            self._show(model)
        await self._records.note_found(self.models)
        return parent.children.get(name)

    async def _find_entry(self, parent: Folder, name: str, model: Model) -> Node:
        prefix = parent.resolver.prefix
        entry = await model.source.store.entry(f"{prefix}{name}")
        if fault := entry_fault(entry):
            raise BadAnswer(f"{model.source.url}: {entry.path!r} is not shown: {fault}")
        node: Node
        if entry.kind != "directory" and not shows(model.face)(entry.path):
            raise NotFound(f"{model.source.url}: {entry.path!r} is hidden by the filters of {model.name}")
        if entry.kind == "directory":
            resolver = _Entries(model, f"{prefix}{name}/")
            node = Folder(inode(model.name, entry.path, "directory"), entry.mtime, resolver=resolver)
        else:
            node = leaf(model.name, entry, model)
        return self.tree.adopt(parent, name, node)

    async def _find_member(self, parent: Branch, name: str) -> Node | None:
        archive: Archive | Image | None = parent.resolver
        entry = await archive.find(f"{parent.path}/{name}" if parent.path else name) if archive else None
        # Of the layers of an image the listing tells, once it is complete.
        return parent.shown.node(Line.of(entry)) if entry else parent.children.get(name)

    async def complete(self, directory: Directory) -> None:
        """Return when all names in `directory` are known.

        Raises:
            ModelfsError: they cannot be found out.

        """
        if isinstance(directory, Branch) and directory.resolver is not None:
            await directory.resolver.finish()

    def subjects(self, name: str | None = None) -> list[Subject]:
        """Return what is cached of one model, or everything that is cached, to be read again.

        Raises:
            NotFound: there is no model of this name.

        """
        return self.files.subjects(self.named(name), also_old=name is None)


def _holders(models: Iterable[Model]) -> list[Holder[Model]]:
    return [
        Holder(model, revision_in(model.source.url), [model.snapshot, *filter(None, [model.before])])
        for model in models
        if model.snapshot is not None and model.snapshot.complete
    ]
