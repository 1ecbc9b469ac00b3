"""Ends a training loop between two steps after SIGTERM or Ctrl-C."""

import signal
import threading
import types
import typing as tp

EXIT_SIGTERM = 128 + signal.SIGTERM


class Interruption:
    """While the block runs, the first SIGTERM or Ctrl-C only sets ``requested``. A second one has
    its usual effect.

    Kubernetes sends SIGTERM some time before it kills a pod. That is enough to finish a step and to
    write a resume point. Outside the main thread Python handles no signals, so this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._signal = 0
        self._previous: dict[int, tp.Any] = {}

    def __enter__(self) -> tp.Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._restore()

    def leave(self) -> tp.NoReturn:
        """Do now what the signal does by default. Another rank may have received it.

        Raises:
            SystemExit: status 143, for SIGTERM.
            KeyboardInterrupt: for Ctrl-C.
        """
        self._restore()
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_SIGTERM)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        self.requested, self._signal = True, number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}
