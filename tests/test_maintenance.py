"""Notices of maintenance, told by a stand-in for Google's metadata server."""

import datetime
import http.server
import json
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


def test_where_nobody_answers_nobody_is_asked_again():
    def watching():
        return [thread for thread in threading.enumerate() if thread.name == "maintenance"]

    with noticed(pytest.fail, address="http://127.0.0.1:9/", every=0.01):
        wait(lambda: not watching())
    with noticed(pytest.fail):  # no machine of Google's
        assert not watching()


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
