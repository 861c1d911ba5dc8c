"""`ModelLoader`: gives a service its model, and loads it again when its device has failed for good.

A rank of several GPUs that dies, or a CUDA error, ends all requests and the model with them. Others can be answered
once it was compiled again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .errors import cause
from .service import log

if TYPE_CHECKING:
    from ..model import Model

WATCH_S = 0.1
"""Seconds between two looks at the engine and its device."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Seconds after a load that failed until the next: twice as many each time, up to the longest pause."""


class Loaded(Protocol):
    """What needs the model: a `Service`, or the engine's process of several."""

    draining: bool

    @property
    def failure(self) -> BaseException | None: ...

    def ready(self, model: Model) -> None: ...

    def unload(self, why: str) -> None: ...

    def reloaded(self) -> None: ...


class ModelLoader:
    """A thread that calls `load` and makes `service` ready, as often as the engine fails. `stop` ends it.

    `on_ready` is called after the first load. If that fails, `error` is what it raised, and `on_error` is called.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        service: Loaded,
        on_ready: Callable[[], None] = lambda: None,
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._load, self._service, self._on_ready, self._on_error = load, service, on_ready, on_error
        self.error: BaseException | None = None
        self._model: Model | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="numballama loader", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def stop(self, within_s: float) -> bool:
        """Load no more, and close the model. False, with the model left open, if a load takes longer than this: a
        compiler cannot be interrupted.
        """
        self._stopped.set()
        self._thread.join(within_s)
        if self._thread.is_alive():
            return False
        self._close()
        return True

    @property
    def _goes_on(self) -> bool:
        return not (self._stopped.is_set() or self._service.draining)

    def _run(self) -> None:
        try:
            self._model = self._load()
            if self._goes_on:
                self._service.ready(self._model)
                self._on_ready()
        except BaseException as error:
            self.error = error
            self._on_error()
            return
        while not self._stopped.wait(WATCH_S):
            if self._goes_on and (failure := self._service.failure) is not None:
                why = f"the model is being loaded again, because its device has failed: {cause(failure)}"
                del failure  # its traceback holds the model's arrays
                self._load_again(why)

    def _load_again(self, why: str) -> None:
        service, pause_s = self._service, FIRST_PAUSE_S
        log.error("%s", why)
        service.unload(why)
        self._close()
        while self._goes_on:
            try:
                self._model = self._load()
                if self._goes_on:
                    service.ready(self._model)
                    service.reloaded()
                    log.info("the model has been loaded again")
                return
            except Exception as error:
                log.error("the model could not be loaded again, next try in %g s: %s", pause_s, error)
                within = f"the server tries it again within {pause_s:g} s"
                service.unload(f"the model could not be loaded again, and {within}: {error}")
                self._close()
            self._stopped.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _close(self) -> None:
        """Close the model. A device that has failed may fail again: then that is logged."""
        model, self._model = self._model, None
        try:
            if model is not None:
                model.close()
        except Exception as error:
            log.error("the model could not be closed: %s", error)
