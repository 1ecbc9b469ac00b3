"""Ending a training loop between two steps, when the system or the user asks for it."""

import signal
import threading
import types
import typing as tp

EXIT_SIGTERM = 128 + signal.SIGTERM


class Interruption:
    """While the block runs, SIGTERM and Ctrl-C only leave a note; a second one acts at once.

    Kubernetes sends SIGTERM some time before it kills a pod: enough to finish a step and write a
    resume point. Outside the main thread, where Python handles no signals, nothing changes.
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
        """Leave as if the signal had come now, here or at another rank.

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
