"""Google's notices that this machine is about to be maintained, passed on as what SIGTERM would say.

Machines with accelerators are not moved for maintenance but ended. Its notice stands on the metadata server of the
machine (cloud.google.com/tpu/docs/view-maintenance-notifications), up to seven days before.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

ADDRESS = "http://metadata.google.internal/computeMetadata/v1/instance/upcoming-maintenance?alt=json"
_MACHINE = Path("/sys/class/dmi/id/product_name")


@contextmanager
def noticed(
    leave: Callable[[], object], *, address: str | None = None, every: float = 20.0, lead: float = 180.0
) -> Iterator[None]:
    """While inside, leave() is called once when maintenance begins within `lead` seconds, or has begun.

    Not for maintenance that was as near when the block began: a run that is begun again before its machine goes would
    leave at once, again and again. address: by default the metadata server's, and nothing is asked on machines that are
    not Google's. every: seconds between questions, which a thread asks; one without an answer tells nothing.
    """
    if address is None:
        if not (_MACHINE.is_file() and "Google" in _MACHINE.read_text(encoding="utf-8", errors="replace")):
            yield
            return
        address = ADDRESS
    ended = threading.Event()

    def ask() -> None:
        before: bool | None = None
        while not ended.is_set():
            with suppress(OSError, ValueError):  # the server may be slower to start than this machine
                now = near(_answer(address), time.time(), lead)
                if now and before is False:
                    leave()
                    return
                before = now
            ended.wait(every)

    thread = threading.Thread(target=ask, name="maintenance", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def near(notice: Mapping[str, Any], now: float, lead: float) -> bool:
    """Whether a notice is of maintenance that is under way, or begins within `lead` seconds of now, a Unix time.

    Raises ValueError for a time that is none.
    """
    told = {name.replace("_", "").lower(): value for name, value in notice.items()}
    if str(told.get("maintenancestatus", "")).upper() == "ONGOING":
        return True
    begins = told.get("windowstarttime")
    return begins is not None and datetime.fromisoformat(str(begins).replace("Z", "+00:00")).timestamp() - now <= lead


def _answer(address: str) -> dict[str, Any]:
    """The notice, empty where there is none: the server then answers with an error's status.

    Raises OSError where nobody answers, or what is no answer, and ValueError for one that is not JSON.
    """
    import http.client  # slow, and of use on few machines
    import urllib.error
    import urllib.request

    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            value = json.loads(answer.read())
    except urllib.error.HTTPError:
        return {}
    except http.client.HTTPException as broken:
        raise OSError(f"{address} does not speak HTTP: {broken!r}") from broken
    return value if isinstance(value, dict) else {}
