import threading

import numpy as np

from bridge.shadow import Shadow, disagreement
from tests.bridge.test_checkpoint import wait_for
from tests.bridge.test_infer import client_of, observation, serving


def always(value, version):
    return lambda observations: (np.full((len(observations), 5, 7), value, np.float32), version)


def test_disagreement_by_hand():
    actions = np.zeros((1, 2, 7))
    candidate = actions.copy()
    actions[..., 6], candidate[..., 6] = 1.0, [1.0, -1.0]
    candidate[0, 0, :3] = [0.03, 0.04, 0.0]
    candidate[0, 1, 3:6] = [0.0, 0.0, -0.2]
    found = disagreement(actions, candidate, 3, 4)
    np.testing.assert_allclose(
        [found.translation_mean_m, found.translation_max_m, found.rotation_mean_rad, found.rotation_max_rad],
        [0.025, 0.05, 0.1, 0.2],
    )
    assert (found.gripper_share, found.version, found.candidate_version) == (0.5, 3, 4)


def test_the_candidate_is_compared_and_never_answers():
    notes = []
    shadow = Shadow(always(0.0, 1), notes.append)
    with serving(shadow) as server, client_of(server.endpoint) as client:
        client.infer(observation(), 5.0)
        assert not notes
        shadow.watch(always(0.5, 2))
        assert client.infer(observation(), 5.0).policy_version == 1
        wait_for(lambda: bool(notes))
        assert (notes[0].version, notes[0].candidate_version) == (1, 2)
        chunk = client.infer(observation(), 5.0)
        assert (chunk.policy_version, chunk.actions[0, 0]) == (1, 0.0)
    shadow.close()


def test_a_candidate_that_hangs_or_fails_delays_nothing():
    release, notes = threading.Event(), []

    def stuck(observations):
        release.wait(10)
        raise RuntimeError("and then it breaks")

    shadow = Shadow(always(0.0, 1), notes.append)
    shadow.watch(stuck)
    with serving(shadow) as server, client_of(server.endpoint) as client:
        for _ in range(5):
            assert client.infer(observation(), 5.0).policy_version == 1
    assert shadow.dropped >= 3
    release.set()
    wait_for(lambda: shadow.failed > 0)
    assert not notes
    shadow.close()
