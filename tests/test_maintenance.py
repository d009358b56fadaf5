"""Notices of maintenance, told by a stand-in for Google's metadata server."""

import datetime
import http.server
import json
import os
import signal
import threading
import time

import pytest

from ddistill import maintenance, signals
from ddistill.maintenance import near, noticed

NOON = datetime.datetime(2026, 11, 28, 12, tzinfo=datetime.UTC).timestamp()
LATER = {"maintenanceStatus": "PENDING", "windowStartTime": "2999-11-28T12:00:00Z"}
ONGOING = {"maintenance_status": "ONGOING"}


@pytest.fixture
def server():
    """A server that answers `notice`, or None as Google's does; `asked` are the headers it was asked with."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            made.asked.append(self.headers["Metadata-Flavor"])
            if isinstance(made.notice, bytes):
                self.wfile.write(made.notice)
                return
            body = {"error": "no notifications have been received yet"} if made.notice is None else made.notice
            self.send_response(503 if made.notice is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.notice, made.asked = None, []
    made.address = f"http://127.0.0.1:{made.server_port}/"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def answered(server, more=2):
    """Wait until so many more questions were answered."""
    before = len(server.asked)
    wait(lambda: len(server.asked) >= before + more)


def test_maintenance_is_near_from_some_seconds_before_its_window_on():
    pending = {"maintenanceStatus": "PENDING", "windowStartTime": "2026-11-28T12:03:00Z"}
    assert not near(pending, NOON, 179) and near(pending, NOON, 180)
    assert near({"maintenance_status": "PENDING", "window_start_time": "2026-11-28T13:03:00+01:00"}, NOON + 1, 179)
    assert near({**pending, "maintenanceStatus": "ongoing"}, NOON, 0)
    assert not near({}, NOON, 1e9) and not near({"error": "none"}, NOON, 1e9)
    with pytest.raises(ValueError):
        near({"windowStartTime": "soon"}, NOON, 0)


def test_what_becomes_near_is_passed_on_once(server):
    left = []
    with noticed(lambda: left.append(1), address=server.address, every=0.01):
        answered(server)
        server.notice = LATER
        answered(server)
        assert not left
        server.notice = ONGOING
        wait(lambda: left)
        time.sleep(0.1)
    assert left == [1] and set(server.asked) == {"Google"}


def test_what_was_near_already_ends_no_run_that_is_begun_again(server):
    left = []
    server.notice = ONGOING
    with noticed(lambda: left.append(1), address=server.address, every=0.01):
        answered(server, 3)
        assert not left
        server.notice = None  # over; the next one counts
        answered(server)
        server.notice = ONGOING
        wait(lambda: left)


def test_what_is_answered_late_or_brokenly_counts_as_not_asked(monkeypatch):
    left, asked = [], []
    answers = [OSError("not there yet"), LATER, ValueError("cut off"), ONGOING]

    def answer(address):
        asked.append(address)
        now = answers[min(len(asked), len(answers)) - 1]
        if isinstance(now, Exception):
            raise now
        return now

    monkeypatch.setattr(maintenance, "_answer", answer)
    with noticed(lambda: left.append(len(asked)), address="of the server", every=0.001):
        wait(lambda: left)
    assert left == [len(answers)]


def test_what_is_no_answer_is_told_apart_from_no_notice(server):
    assert maintenance._answer(server.address) == {}
    server.notice = b"no HTTP\n\n"
    with pytest.raises(OSError, match="does not speak HTTP"):
        maintenance._answer(server.address)


def test_machines_that_are_not_googles_are_not_asked():
    with noticed(pytest.fail):
        assert not [thread for thread in threading.enumerate() if thread.name == "maintenance"]


def test_a_training_hears_it_as_sigterm(server, tmp_path, monkeypatch):
    machine = tmp_path / "product_name"
    machine.write_text("Google Compute Engine\n")
    monkeypatch.setattr(maintenance, "_MACHINE", machine)
    monkeypatch.setattr(maintenance, "ADDRESS", server.address)
    monkeypatch.setattr(signals, "noticed", lambda leave: noticed(leave, every=0.01))
    with signals.on_signals() as stop, stop.watch():
        answered(server)
        assert not stop.now()
        server.notice = ONGOING
        wait(stop.now)
        assert stop.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # of the machine, which follows: not "at once"
        with pytest.raises(signals.Stopped, match="at once"):
            os.kill(os.getpid(), signal.SIGTERM)
