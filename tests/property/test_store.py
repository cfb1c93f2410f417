"""Memory, disk and views against a model: nothing lost, nothing leaked, nothing seen is reused."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from poolray.ids import ObjectId
from poolray.node.effects import (
    DeleteFile,
    DeleteUnsealed,
    Effect,
    Reply,
    RestoreObject,
    SpillObjects,
)
from poolray.protocol.client import (
    AllocateRange,
    CancelRequest,
    GetObjects,
    ObjectValues,
    PutObject,
    RangeGranted,
    ReturnRange,
    UnpinObjects,
)
from poolray.protocol.node import (
    ClientLeft,
    RestoreDone,
    RestoreFailed,
    SpillDone,
    SpillFailed,
)
from poolray.protocol.values import InArena, InFile, Value
from tests.unit.node_harness import Bench

PAGE = 4096
PAGES = 8
CLIENTS = [b"one", b"two", b"three"]
some_client = st.sampled_from(CLIENTS)
some_index = st.integers(0, 10**6)


class StoreMachine(RuleBasedStateMachine):
    """Processes that write, read, look and let go; threads that write and read files, or fail."""

    @initialize(
        mark=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
        file_pages=st.sampled_from([1, 3, 100]),
        threads=st.integers(1, 3),
    )
    def start(self, mark: float, file_pages: int, threads: int) -> None:
        self.bench = Bench(
            arena_bytes=PAGES * PAGE,
            object_spilling_threshold=mark,
            min_spilling_size_bytes=file_pages * PAGE,
            max_io_workers=threads,
            spill_retry_s=1.0,
        )
        self.count = 0
        #: page -> what was written there last; file -> offset -> what it holds.
        self.memory: dict[int, ObjectId] = {}
        self.files: dict[str, dict[int, ObjectId]] = {}
        #: Jobs of threads that have begun.
        self.jobs: list[SpillObjects | RestoreObject] = []
        #: client -> what it holds; (client, object) -> places that it looks at.
        self.held: dict[bytes, set[ObjectId]] = {client: set() for client in CLIENTS}
        self.views: dict[tuple[bytes, ObjectId], list[InArena]] = {}
        self.sizes: dict[ObjectId, int] = {}
        #: request -> who asked for a place, or for values.
        self.asked: dict[int, tuple[bytes, ObjectId]] = {}
        self.getting: dict[int, tuple[bytes, ObjectId]] = {}
        self.granted: list[tuple[bytes, ObjectId, RangeGranted]] = []

    # ---- what the shell would do -----------------------------------------------------------------

    def tell(self, message: object, sender: bytes = b"") -> None:
        self.bench.tell(message, sender)  # type: ignore[arg-type]
        effects, self.bench.effects = self.bench.effects, []
        for effect in effects:
            self.act(effect)

    def act(self, effect: Effect) -> None:
        match effect:
            case SpillObjects() | RestoreObject():
                self.jobs.append(effect)
            case DeleteFile(path=path):
                del self.files[path]
            case DeleteUnsealed():
                pass  # nothing is written before it is sealed
            case Reply(client_id=client, message=RangeGranted() as message):
                who, object_id = self.asked.pop(message.request_id)
                assert who == client
                self.granted.append((who, object_id, message))
            case Reply(message=ObjectValues() as message):
                self.look(message)

    def look(self, message: ObjectValues) -> None:
        """A client gets a value: it is the right one, and is looked at from now on."""
        client, object_id = self.getting.pop(message.request_id)
        assert not message.errors
        (value,) = message.values
        self.check(object_id, value)
        if isinstance(value, InArena):
            self.views.setdefault((client, object_id), []).append(value)

    def check(self, object_id: ObjectId, value: Value) -> None:
        """There is what was written."""
        if isinstance(value, InFile):
            assert self.files[value.path][value.offset] == object_id
        else:
            assert isinstance(value, InArena)
            for page in self.pages(value.offset, value.size_bytes):
                assert self.memory[page] == object_id, "memory was reused"

    def pages(self, offset: int, size_bytes: int) -> range:
        return range(offset // PAGE, (offset + size_bytes) // PAGE)

    def fill(self, object_id: ObjectId, offset: int) -> None:
        for page in self.pages(offset, self.sizes[object_id]):
            self.memory[page] = object_id

    # ---- processes -------------------------------------------------------------------------------

    @rule(client=some_client, pages=st.integers(1, PAGES + 1))
    def ask(self, client: bytes, pages: int) -> None:
        self.count += 1
        object_id = ObjectId(b"%028d" % self.count)
        self.sizes[object_id] = pages * PAGE
        self.asked[self.count] = client, object_id
        self.tell(
            AllocateRange(request_id=self.count, object_id=object_id, size_bytes=pages * PAGE),
            client,
        )

    @precondition(lambda self: self.granted)
    @rule(which=some_index, succeeds=st.integers(0, 9))
    def seal(self, which: int, succeeds: int) -> None:
        client, object_id, grant = self.granted.pop(which % len(self.granted))
        if not succeeds:
            self.tell(ReturnRange(object_id=object_id), client)
            return
        size = self.sizes[object_id]
        value: Value
        if grant.offset < 0:
            path = f"/own/{grant.file_number}"
            self.files[path] = {0: object_id}
            value = InFile(object_id=object_id, path=path, size_bytes=size)
        else:
            self.fill(object_id, grant.offset)
            value = InArena(object_id=object_id, offset=grant.offset, size_bytes=size)
        self.held[client].add(object_id)
        self.tell(PutObject(object_id=object_id, value=value), client)

    @precondition(lambda self: self.asked)
    @rule(which=some_index)
    def give_up_waiting(self, which: int) -> None:
        request_id = sorted(self.asked)[which % len(self.asked)]
        client, _ = self.asked.pop(request_id)
        self.tell(CancelRequest(request_id=request_id), client)

    def choose(self, which: int) -> ObjectId | None:
        """Some object that somebody holds."""
        living = sorted(set().union(*self.held.values()))
        return living[which % len(living)] if living else None

    @rule(client=some_client, which=some_index)
    def get(self, client: bytes, which: int) -> None:
        object_id = self.choose(which)
        if object_id is None:
            return
        self.bench.hold(object_id, client=client)
        self.held[client].add(object_id)
        self.count += 1
        self.getting[self.count] = client, object_id
        self.tell(GetObjects(request_id=self.count, object_ids=[object_id]), client)

    @precondition(lambda self: self.views)
    @rule(which=some_index)
    def stop_looking(self, which: int) -> None:
        key = sorted(self.views)[which % len(self.views)]
        self.views[key].pop()
        if not self.views[key]:
            del self.views[key]
        self.tell(UnpinObjects(object_ids=[key[1]]), key[0])

    @rule(client=some_client, which=some_index)
    def drop(self, client: bytes, which: int) -> None:
        """A process lets go of an object with its last ref and its last view."""
        mine = sorted(self.held[client])
        if not mine:
            return
        object_id = mine[which % len(mine)]
        if (client, object_id) in self.getting.values():
            return  # it waits for it
        self.held[client].remove(object_id)
        self.views.pop((client, object_id), None)
        self.bench.drop(object_id, client=client)
        self.tell(UnpinObjects(object_ids=[]), client)

    @rule(client=some_client)
    def leave(self, client: bytes) -> None:
        self.held[client].clear()
        for table in (self.asked, self.getting):
            for request_id in [r for r, (who, _) in table.items() if who == client]:
                del table[request_id]
        self.granted = [grant for grant in self.granted if grant[0] != client]
        for key in [key for key in self.views if key[0] == client]:
            del self.views[key]
        self.tell(ClientLeft(client_id=client))

    # ---- threads ---------------------------------------------------------------------------------

    @precondition(lambda self: self.jobs)
    @rule(which=some_index, succeeds=st.integers(0, 4))
    def finish_job(self, which: int, succeeds: int) -> None:
        job = self.jobs.pop(which % len(self.jobs))
        if isinstance(job, SpillObjects):
            self.finish_spill(job, bool(succeeds))
        else:
            self.finish_restore(job, bool(succeeds))

    def finish_spill(self, job: SpillObjects, succeeds: bool) -> None:
        for place in job.places:
            self.check(place.object_id, place)  # the thread read it until now
        if not succeeds:
            self.tell(SpillFailed(batch=job.batch, reason="full", elapsed_s=0.1))
            return
        path = f"/spilled/{job.batch}"
        self.files[path] = {index: place.object_id for index, place in enumerate(job.places)}
        places = [
            InFile(object_id=place.object_id, path=path, size_bytes=place.size_bytes, offset=index)
            for index, place in enumerate(job.places)
        ]
        self.tell(SpillDone(batch=job.batch, places=places, elapsed_s=0.1))

    def finish_restore(self, job: RestoreObject, succeeds: bool) -> None:
        is_there = job.place.path in self.files
        if is_there and succeeds:
            self.check(job.place.object_id, job.place)
            self.fill(job.place.object_id, job.offset)
            self.tell(RestoreDone(restore=job.restore, elapsed_s=0.1))
            return
        self.tell(
            RestoreFailed(restore=job.restore, reason="gone", is_lost=not is_there, elapsed_s=0.1)
        )

    @rule(seconds=st.sampled_from([0.1, 2.0]))
    def wait(self, seconds: float) -> None:
        self.bench.now += seconds

    # ---- what holds ------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "bench"):
            return
        objects = self.bench.node.state.objects
        living = set().union(*self.held.values())
        assert set(objects) == living
        for object_id in living:
            self.check(object_id, objects[object_id].value)

    @invariant()
    def nothing_that_is_seen_is_reused(self) -> None:
        if hasattr(self, "bench"):
            for (_, object_id), places in self.views.items():
                for place in places:
                    self.check(object_id, place)

    @invariant()
    def who_waits_waits_for_a_thread(self) -> None:
        if hasattr(self, "bench"):
            assert self.jobs or not (self.asked or self.getting)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        while self.jobs:
            self.finish_job(0, 1)
        assert not self.asked
        assert not self.getting
        for client in CLIENTS:
            self.leave(client)
        while self.jobs:
            self.finish_job(0, 1)
        self.bench.assert_empty()
        assert self.files == {}


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
