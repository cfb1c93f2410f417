"""The threads that move values between the arena and files.

What: writes batches, reads values back, deletes files; tells the runtime what came of it.
Who calls: the runtime carries out the machine's effects with it.
May touch: the arena, the session's folders, threads, the clock.
Invariants: large reads and writes release the interpreter's lock; a job is reported once; after
`stop` no thread is left and none is at work on the arena.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeAlias, final

from poolray.local.session_folder import SessionFolders, remove_file
from poolray.node.effects import DeleteFile, DeleteUnsealed, RestoreObject, SpillObjects
from poolray.objects.shared_memory import Arena
from poolray.objects.spill_files import SpillFileError, read_object, write_objects
from poolray.protocol.node import FileSealed, RestoreDone, RestoreFailed, SpillDone, SpillFailed
from poolray.protocol.values import InFile

_log = logging.getLogger(__name__)

Outcome: TypeAlias = SpillDone | SpillFailed | RestoreDone | RestoreFailed | FileSealed
#: A callable is what only some shells do with files.
Job: TypeAlias = (
    SpillObjects | RestoreObject | DeleteFile | DeleteUnsealed | Callable[[], FileSealed]
)


@final
class SpillThreads:
    """Carries jobs out, each on some thread; starts threads as jobs come.

    Parameters
    ----------
    report : callable
        Takes what came of a job, on the thread that did it.
    """

    def __init__(
        self,
        arena: Arena,
        folders: SessionFolders,
        threads_max: int,
        report: Callable[[Outcome], None],
    ) -> None:
        self._arena = arena
        self._folders = folders
        self._threads_max = threads_max
        self._report = report
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        #: Guards `_idle`.
        self._lock = threading.Lock()
        #: Threads that wait for a job, less the jobs that wait for a thread.
        self._idle = 0
        self._stopped = False
        self._numbers = itertools.count(1)

    def start(self, job: Job) -> None:
        """Have a job done; the caller holds the runtime's guard."""
        if self._stopped:
            return  # the folders go, with all that is in them
        with self._lock:
            self._idle -= 1
            wants_thread = self._idle < 0 and len(self._threads) < self._threads_max
            if wants_thread:
                self._idle += 1
        self._jobs.put(job)
        if wants_thread:
            thread = threading.Thread(target=self._run, name="poolray-io", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            outcome = None if self._stopped else self._do(job)
            del job
            if outcome is not None and not self._stopped:
                self._report(outcome)
            with self._lock:
                self._idle += 1

    def _do(self, job: Job) -> Outcome | None:
        if isinstance(job, SpillObjects):
            return self._spill(job)
        if isinstance(job, RestoreObject):
            return self._restore(job)
        if callable(job):
            return job()
        try:
            if isinstance(job, DeleteFile):
                remove_file(job.path)
            else:
                self._folders.delete(file_name(job.file_number))
        except (OSError, ValueError) as error:  # (no path at all is a ValueError)
            # Storage out of reach: the folder goes with the runtime.
            _log.warning("a file of values cannot be deleted now: %s", error)
        return None

    def _spill(self, job: SpillObjects) -> Outcome:
        began = time.monotonic()
        for place in job.places:
            self._arena.map_range(place.offset, place.size_bytes)
        sources = [self._arena.write(place.offset, place.size_bytes) for place in job.places]
        try:
            failure: OSError | None = None
            for folder in self._folders.next_folders():
                path = os.path.join(folder, f"spilled-{next(self._numbers)}")
                try:
                    written = write_objects(path, sources)
                except OSError as error:
                    failure = error  # the next folder may be on a disk that has room
                    continue
                places = [
                    InFile(
                        object_id=place.object_id,
                        path=path,
                        size_bytes=place.size_bytes,
                        offset=offset,
                        checksum=checksum,
                    )
                    for place, (offset, checksum) in zip(job.places, written, strict=True)
                ]
                elapsed_s = time.monotonic() - began
                return SpillDone(batch=job.batch, places=places, elapsed_s=elapsed_s)
            assert failure is not None
            raise failure
        except Exception as error:
            reason = f"writing failed ({error})"
            elapsed_s = time.monotonic() - began
            return SpillFailed(batch=job.batch, reason=reason, elapsed_s=elapsed_s)
        finally:
            for source in sources:
                source.release()

    def _restore(self, job: RestoreObject) -> Outcome:
        began = time.monotonic()
        place = job.place
        target = self._arena.write(job.offset, place.size_bytes)
        reason, is_lost = "", False
        try:
            read_object(place.path, place.offset, place.checksum, target)
        except SpillFileError as error:
            reason, is_lost = error.reason, error.is_lost
        except Exception as error:
            reason = f"its file {place.path} cannot be read: {error}"
        finally:
            target.release()
        elapsed_s = time.monotonic() - began
        if not reason:
            return RestoreDone(restore=job.restore, elapsed_s=elapsed_s)
        return RestoreFailed(
            restore=job.restore, reason=reason, is_lost=is_lost, elapsed_s=elapsed_s
        )

    def stop(self) -> None:
        """Finish what is being done, drop what is not begun, end the threads."""
        self._stopped = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


def file_name(number: int) -> str:
    """Name of the file that a client writes an object to."""
    return f"value-{number}"
