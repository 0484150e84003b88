import os
import random

import pytest
import rclpy
from rcl_interfaces.msg import ParameterType
from rclpy.node import Node
from rclpy.parameter import Parameter

from robot import params
from robot.config import ArmConfig, CameraConfig, RuntimeConfig
from robot.recorder_node import RecorderNodeConfig


@pytest.fixture(scope="module")
def context():
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=random.randint(1, 100))
    yield context
    rclpy.shutdown(context=context)


@pytest.fixture
def node_with(context):
    nodes = []

    def make(**overrides):
        overrides = [Parameter(name, value=value) for name, value in overrides.items()]
        nodes.append(Node("n", context=context, parameter_overrides=overrides, enable_rosout=False))
        return nodes[-1]

    yield make
    for node in nodes:
        node.destroy_node()


def test_fields_become_parameters_with_description_range_and_type(node_with):
    node = node_with()
    config = params.declare(node, ArmConfig)
    assert config == ArmConfig()
    descriptor = node.describe_parameter("stream_rate_hz")
    assert descriptor.description.startswith("rate at which absolute poses")
    assert descriptor.floating_point_range[0].to_value == 200.0
    assert descriptor.type == ParameterType.PARAMETER_DOUBLE
    assert node.get_parameter("limits.workspace_lower_m").value == [0.20, -0.45, 0.018]
    assert node.describe_parameter("limits.keep_out_m").type == ParameterType.PARAMETER_DOUBLE_ARRAY


@pytest.mark.parametrize("schema", [ArmConfig, CameraConfig, RuntimeConfig, RecorderNodeConfig])
def test_every_setting_is_described_and_every_number_has_a_range(node_with, schema):
    node = node_with()
    params.declare(node, schema)
    for name in node._parameters:
        if name not in ("use_sim_time", "start_type_description_service"):
            about = node.describe_parameter(name)
            assert about.description, name
            if about.type in (ParameterType.PARAMETER_INTEGER, ParameterType.PARAMETER_DOUBLE):
                assert about.integer_range or about.floating_point_range, name


def test_given_values_reach_the_dataclass(node_with):
    overrides = {"host": "127.0.0.9", "gripper.force_n": 30.0, "limits.keep_out_m": [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]}
    config = params.declare(node_with(**overrides), ArmConfig)
    assert (config.host, config.gripper.force_n) == ("127.0.0.9", 30.0)
    assert config.limits.keep_out_boxes.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stream_rate_hz": 1000.0}, r"stream_rate_hz.*allowed are 10.0 to 200.0"),
        ({"stream_rate_hz": "fast"}, r"stream_rate_hz.*number with a decimal point"),
        ({"streaming": "magic"}, "allowed are 'position' and 'impedance'"),
        ({"limits.workspace_upper_m": [0.0, 0.0, 0.0]}, "workspace is empty"),
    ],
)
def test_mistakes_are_named(node_with, overrides, message):
    with pytest.raises(ValueError, match=message):
        params.declare(node_with(**overrides), ArmConfig)


def test_only_what_a_node_listens_to_can_change_while_it_runs(node_with):
    node = node_with()
    params.declare(node, RuntimeConfig, writable=("instruction",))
    (result,) = node.set_parameters([Parameter("instruction", value="wave")])
    assert result.successful
    (result,) = node.set_parameters([Parameter("deadline_s", value=1.0)])
    assert not result.successful


def test_embodiments_by_name_and_by_path(tmp_path):
    embodiment = params.load_embodiment("fr3_tabletop")
    embodiment.save(tmp_path / "contract.json")
    assert params.load_embodiment(str(tmp_path / "contract.json")).contract_hash == embodiment.contract_hash
    with pytest.raises(ValueError, match="fr3_tabletop"):
        params.load_embodiment("unknown")
