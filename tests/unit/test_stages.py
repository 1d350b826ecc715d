"""How the time of a start is divided."""

from __future__ import annotations

from server.engine.stages import StageTimes


def test_stages_follow_each_other_and_may_come_again() -> None:
    now = 10.0
    stages = StageTimes("import", lambda: now)
    now = 11.5
    stages.enter("weights")
    stages.enter("weights")
    now = 14.5
    stages.enter("warm-up")
    now = 15.0
    stages.enter("weights")
    now = 16.0
    assert stages.seconds() == {"import": 1.5, "weights": 4.0, "warm-up": 0.5}
