import pytest

from bridge.embodiment import Camera, Embodiment, differences
from bridge.errors import SchemaMismatch


def make(**changes):
    return Embodiment(cameras={"third_person": Camera(), "wrist": Camera(mount="tcp")}, **changes)


def test_hash_is_stable_and_sees_every_field(tmp_path):
    one = make()
    one.save(tmp_path / "contract.json")
    assert Embodiment.load(tmp_path / "contract.json").contract_hash == one.contract_hash
    assert make(policy_rate_hz=5.0).contract_hash != one.contract_hash
    other = make()
    other.cameras["wrist"].fx += 1.0
    assert other.contract_hash != one.contract_hash


def test_int_and_float_are_the_same_number():
    assert make(policy_rate_hz=10).contract_hash == make(policy_rate_hz=10.0).contract_hash


def test_mismatch_names_field_and_both_values():
    with pytest.raises(SchemaMismatch, match=r"policy_rate_hz: ours 10.0, theirs 5.0"):
        make().require_same(make(policy_rate_hz=5.0), "checkpoint 3")
    make().require_same(make(policy_rate_hz=5.0), "checkpoint 3", allow_contract_mismatch=["policy_rate_hz"])


def test_differences_reach_into_cameras():
    other = make()
    other.cameras["wrist"].cx = 300.0
    assert list(differences(make().to_dict(), other.to_dict())) == ["cameras.wrist.cx"]


def test_missing_camera_is_a_difference():
    other = make()
    del other.cameras["wrist"]
    assert any(key.startswith("cameras.wrist") for key in differences(make().to_dict(), other.to_dict()))


@pytest.mark.parametrize(
    "bad", [{"policy_rate_hz": 0}, {"action_reference": "measured"}, {"home_joint_pos_rad": [0.0]}]
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_bad_file_is_named(tmp_path):
    path = tmp_path / "contract.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="contract.json"):
        Embodiment.load(path)


def test_camera_must_be_rigid():
    with pytest.raises(ValueError, match="rigid"):
        Camera(T_mount_cam=[2.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1])
