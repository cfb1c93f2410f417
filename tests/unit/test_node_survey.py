"""Questions about all nodes: who is asked, whose rows come, and what ends the wait."""

from __future__ import annotations

from poolray.ids import ClientId, NodeId, TaskId, WorkerId
from poolray.node.effects import LookIntoLogs, Reply, SendPeer
from poolray.protocol.node import (
    ClientLeft,
    ClusterView,
    LogsSeen,
    NodeDied,
    NodeView,
    PeerQuery,
    PeerRows,
    Tick,
)
from poolray.protocol.state import (
    Condition,
    LogRow,
    LogTextRow,
    LogWish,
    QueryState,
    StateKind,
    StateRows,
    TaskRow,
)
from tests.unit.node_harness import CPU, DRIVER, NODE, Bench

B, C = NodeId(b"B" * 28), NodeId(b"C" * 28)


def bench_with(*peers: NodeId) -> Bench:
    bench = Bench()
    views = [
        NodeView(node_id=peer, total={}, available={"CPU": CPU}, queued_tasks=0) for peer in peers
    ]
    bench.tell(ClusterView(nodes=views))
    bench.effects.clear()
    return bench


def ask(bench: Bench, kind: StateKind = StateKind.TASKS, client: ClientId = DRIVER) -> None:
    question = QueryState(request_id=7, kind=kind, everywhere=True, timeout_s=5.0, limit=9)
    bench.tell(question, client)


def replies(bench: Bench) -> list[StateRows]:
    found = [e.message for e in bench.effects if isinstance(e, Reply)]
    return [message for message in found if isinstance(message, StateRows)]


def asked(bench: Bench) -> dict[NodeId, PeerQuery]:
    return {
        e.node_id: e.message
        for e in bench.effects
        if isinstance(e, SendPeer) and isinstance(e.message, PeerQuery)
    }


def row(number: int, ended_s: float) -> TaskRow:
    return TaskRow(
        task_id=TaskId(bytes([number]) * 24),
        attempt=0,
        name="f",
        function_name="m.f",
        state="FINISHED",
        required={},
        worker_id=WorkerId(b"W" * 28),
        ended_s=ended_s,
    )


def test_all_live_peers_are_asked_and_the_last_answer_ends_it() -> None:
    bench = bench_with(B, C)
    ask(bench)
    questions = asked(bench)
    assert questions.keys() == {B, C}
    assert {q.limit for q in questions.values()} == {9}
    number = questions[B].request_id
    assert [reply.more for reply in replies(bench)] == [True]
    bench.tell(PeerRows(request_id=number, now_s=bench.now, rows=[row(1, 1.0)], more=True), B)
    bench.tell(PeerRows(request_id=number, now_s=bench.now, rows=[]), B)
    bench.tell(PeerRows(request_id=number, now_s=bench.now, rows=[row(2, 1.0)]), C)
    parts = replies(bench)
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    assert [r.node_id for part in parts for r in part.rows] == [B, C]  # type: ignore[union-attr]
    assert all(part.request_id == 7 and not part.missing for part in parts)
    bench.effects.clear()
    bench.tell(PeerRows(request_id=number, now_s=bench.now, rows=[row(3, 1.0)]), C)
    assert not replies(bench)  # it was answered


def test_times_of_others_are_on_our_clock() -> None:
    bench = bench_with(B)
    ask(bench)
    number = asked(bench)[B].request_id
    began_s = bench.now
    bench.now += 2.0
    # (Its clock is a thousand seconds ahead, and the answer took half of the round trip.)
    theirs_s = began_s + 1.0 + 1000.0
    bench.tell(PeerRows(request_id=number, now_s=theirs_s, rows=[row(1, theirs_s - 10.0)]), B)
    (found,) = [r for part in replies(bench) for r in part.rows]
    assert isinstance(found, TaskRow)
    assert abs(found.ended_s - (began_s + 1.0 - 10.0)) < 1e-6


def test_who_does_not_answer_in_time_or_dies_is_missing() -> None:
    bench = bench_with(B, C)
    ask(bench)
    deadline_s = bench.node.next_deadline()
    assert deadline_s is not None
    assert deadline_s <= bench.now + 5.0
    bench.tell(NodeDied(node_id=C))
    assert all(part.more for part in replies(bench))
    bench.now += 5.1
    bench.tell(Tick())
    last = replies(bench)[-1]
    assert not last.more
    assert sorted(last.missing) == [B, C]


def test_the_death_of_the_last_one_ends_the_wait() -> None:
    bench = bench_with(B)
    ask(bench)
    bench.tell(NodeDied(node_id=B))
    assert replies(bench)[-1].missing == [B]
    assert not replies(bench)[-1].more


def test_who_left_gets_nothing_and_alone_nobody_is_asked() -> None:
    bench = bench_with(B)
    client = ClientId(b"another")
    ask(bench, client=client)
    number = asked(bench)[B].request_id
    bench.tell(ClientLeft(client_id=client))
    bench.effects.clear()
    bench.tell(PeerRows(request_id=number, now_s=bench.now, rows=[row(1, 1.0)]), B)
    assert not replies(bench)
    alone = Bench()
    ask(alone)
    assert not asked(alone)
    assert [part.more for part in replies(alone)] == [False]
    nodes = bench_with(B)
    ask(nodes, StateKind.NODES)
    assert not asked(nodes)


def test_a_peer_is_told_in_parts() -> None:
    bench = bench_with(B)
    bench.tell(PeerQuery(request_id=3, kind=StateKind.TASKS), B)
    (effect,) = [e for e in bench.effects if isinstance(e, SendPeer)]
    assert effect.node_id == B
    assert effect.message == PeerRows(request_id=3, now_s=bench.now, rows=[], more=False)


def test_filters_hold_at_each_node_before_its_limit() -> None:
    bench = bench_with(B)
    for name in ("other", "Wanted"):
        kind = bench.task_class(name=name)
        for _ in range(5):
            bench.submit(kind)
    for equal, names in ((True, {"Wanted"}), (False, {"other"})):
        where = [Condition(field="name", equal=equal, value="wanted")]
        bench.effects.clear()
        bench.tell(
            QueryState(request_id=7, kind=StateKind.TASKS, everywhere=True, limit=3, where=where),
            DRIVER,
        )
        assert asked(bench)[B].where == where
        (own,) = replies(bench)
        bench.effects.clear()
        bench.tell(PeerQuery(request_id=1, kind=StateKind.TASKS, limit=3, where=where), B)
        (told,) = [e.message for e in bench.effects if isinstance(e, SendPeer)]
        assert isinstance(told, PeerRows)
        for rows in (own.rows, told.rows):
            assert len(rows) == 3
            assert {row.name for row in rows if isinstance(row, TaskRow)} == names


# ---- files of logs -------------------------------------------------------------------------------

WISH = LogWish(name="head.log", start=-10, size_bytes=10)
TEXT = LogTextRow(name="head.log", data=b"words", start=5, first=0, end=10)


def ask_for_text(bench: Bench, node_id: NodeId, client: ClientId = DRIVER) -> None:
    question = QueryState(
        request_id=7, kind=StateKind.LOG_TEXT, of_node=node_id, log=WISH, timeout_s=5.0
    )
    bench.tell(question, client)


def looks(bench: Bench) -> list[LookIntoLogs]:
    return [effect for effect in bench.effects if isinstance(effect, LookIntoLogs)]


def test_the_shell_reads_the_own_files_and_nobody_else_is_asked() -> None:
    for node_id in (NodeId(b""), NODE):
        bench = bench_with(B)
        ask_for_text(bench, node_id)
        (look,) = looks(bench)
        assert (look.kind, look.wish) == (StateKind.LOG_TEXT, WISH)
        assert not asked(bench)
        assert not replies(bench)
        bench.tell(LogsSeen(number=look.number, rows=[TEXT]))
        (reply,) = replies(bench)
        assert (reply.request_id, reply.rows, reply.more) == (7, [TEXT], False)


def test_another_node_is_asked_alone_and_its_answer_passed_on() -> None:
    bench = bench_with(B, C)
    ask_for_text(bench, B)
    questions = asked(bench)
    assert questions.keys() == {B}
    assert questions[B].log == WISH
    assert not looks(bench)
    bench.tell(PeerRows(request_id=questions[B].request_id, now_s=bench.now, rows=[TEXT]), B)
    rows = [each for part in replies(bench) for each in part.rows]
    assert [(each.node_id, each.data) for each in rows if isinstance(each, LogTextRow)] == [
        (B, b"words")
    ]
    assert not replies(bench)[-1].more


def test_a_peer_that_asks_for_files_is_answered_under_its_number() -> None:
    bench = bench_with(B)
    bench.tell(PeerQuery(request_id=3, kind=StateKind.LOGS, log=LogWish(pattern="*.out")), B)
    (look,) = looks(bench)
    rows = [LogRow(name=f"worker-{number}.out", size_bytes=1) for number in range(300)]
    bench.tell(LogsSeen(number=look.number, rows=list(rows)))
    told = [e.message for e in bench.effects if isinstance(e, SendPeer)]
    answers = [message for message in told if isinstance(message, PeerRows)]
    assert [answer.more for answer in answers] == [True] * (len(answers) - 1) + [False]
    assert [each for answer in answers for each in answer.rows] == rows
    assert {answer.request_id for answer in answers} == {3}


def test_a_node_that_is_dead_or_silent_is_named() -> None:
    bench = bench_with(B)
    ask_for_text(bench, C)  # nobody knows it
    assert [(part.missing, part.more) for part in replies(bench)] == [([C], False)]
    for end in (NodeDied(node_id=B), Tick()):
        bench = bench_with(B)
        ask_for_text(bench, B)
        bench.now += 5.1
        bench.tell(end)
        assert [(part.missing, part.more) for part in replies(bench)] == [([B], False)]
    ask_for_text(bench, B, ClientId(b"another"))
    bench.tell(ClientLeft(client_id=ClientId(b"another")))
    bench.tell(NodeDied(node_id=B))
    bench.effects.clear()
    ask_for_text(bench, B)
    assert [part.missing for part in replies(bench)] == [[B]]
