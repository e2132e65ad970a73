"""What every test file shares: seeds, the hypothesis profile, and where data and the core are."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

settings.register_profile("maml_fast", deadline=None, derandomize=True, database=None)
settings.load_profile("maml_fast")


EXHAUSTIVE = re.compile(
    "|".join(
        [
            # the core suite holds the core in float64 and vmap, both to second order, against the reference
            r"test_matches_the_reference\[(cpu-float32|vmap|.*-first\])",
            r"test_changes_between_forward_and_backward\[.*-(vmap|reference)\]",
            r"test_the_gradient_is_the_forwards\[.*-(vmap|reference)\]",
            r"test_whatever_changed_counts\[.*-other\]",
            r"test_any_parameters_adapt_with_any_rates\[(.*-first|(conv|grouped)-(number|in turn)-second)\]",
            r"test_compiled_calls_match_eager_ones\[.*-sum-",
            r"test_same_bits_for_any_number_of_threads\[(float64.*|.*baseline)\]",
            r"test_random(_image)?_networks_match_the_reference\[vmap\]",
            r"test_mistakes_are_named|test_random_networks_agree\[[12]\]",
            r"test_(verify_and_the_self_check|verify)\[",
            r"test_one_sample_and_first_order",
            r"test_device_that_is_not_there_is_told_of_in_a_line",
            r"test_a_line_per_plan_and_call\[(vmap|reference)\]",
            # gradients of the zoo: those that others have too, and the longest
            r"test_zoo.py::test_(everything|gradient\[(.*drop.*|resnet18|lstm.*|densenet|mobilenet.*|unet-.*)\])",
            r"test_a_second_derivative\[.*-(vmap|reference)\]",
            # a training run, a wait for a time limit, or a compiler of its own
            r"test_resuming_gives_the_same_bits\[small_omniglot\]",
            r"test_omniglot_learns_validates_and_keeps_the_best",
            r"test_omniglot_equals_the_authors_resizing",
            r"test_outcomes\[.*it took more than",
            r"test_verify_command.*test_ctrl_c_says_how_to_go_on",
            r"test_ctrl_c_leaves_no_process\[(bench|verify)",
            r"test_stress_under_sanitizer",
            r"test_a_pytorch_without_inductors_allocator",
            r"test_inductor|test_compiled_peer|test_compiled_models_of_the_zoo",
            # what the core suite holds by other models, in another dtype or on another backend
            r"test_vmap_is_the_reference",
            r"test_every_backend_draws_the_same",
            r"test_losses_of_no_name_are_fused_too",
            r"test_outputs_of_the_same_pass",
            r"test_meta_loss_entry_by_entry",
            r"test_vinyals_split_of_the_real_characters",
            r"test_memory_of_the_loop_grows_with_tasks",
            r"test_rules.py::test_agrees\[.*-(wide-.*|images-True)\]",
            r"test_rules.py::test_agrees\[(?!adam-|nesterov-|rmsprop-centered-).*-images-False\]",
            r"test_rules.py::test_verifies_in_single_precision\[(momentum|rmsprop)\]",
            r"test_learned_numbers\[dense-.*(step_weights|tape_bytes)|test_learned_numbers\[images-(scalars|by).*-\{\}\]",
            r"test_the_same_bits_with_checkpoints\[(plain|learned|momentum)-",
            r"test_the_same_bits_with_checkpoints\[.*(0\.5|'order'|'last': 0).*\]",
            r"test_the_implicit_gradient_agrees\[adam-dense.*\]",
            r"test_clipping\[(momentum|adam)-(True-.*|.*1000.*)\]",
            r"test_gradient_modes.py::test_verifies_in_single_precision\[(?!.*Implicit).*\]",
            # in Triton's interpreter: what the same kernels do in another case
            r"test_triton_interpreter.*test_second_order\[(function-.*|.*(-plain|-eval|-untracked|-no-bias|-signal|1d).*)\]",
            r"test_triton_interpreter.*test_second_order\[(conv-(1x1|5x5|2x3|same|function|one-image|rates)|tied.*|size-.*)\]",
            r"test_triton_interpreter.*test_second_order\[(rate-(zero|negative)|loss-.*-.*|.*-(rates|stride-2|whole-image))\]",
            r"test_triton_algorithms.*test_rules\[(dampened|nesterov|adam-decay|rmsprop)\]",
            r"test_triton_algorithms.*test_rates_of_each_step\[(dense-(scalars|by element)|images-numbers)\]",
            r"test_triton_algorithms.*test_learned_numbers\[(dense-(elements|per step)|images-(scalars|by name))\]",
            r"test_triton_algorithms.*test_gradient_modes\[(plain-(neumann|last|first|again)|momentum-(cg|first))\]",
            r"test_triton_algorithms.*test_clipping\[(plain-value|adam-not|signs-(value|not))\]|test_several_blocks\[(elements|cg)\]",
            r"test_(further_)?kernels_compile_within_the_limits\[(80|100|120)",
        ]
    )
)
"""What is left to `make test-exhaustive`: combinations whose parts the others have, and what takes long."""

THOROUGH = re.compile(
    "|".join(
        [
            # what the core suite holds by other models, in another dtype or on another backend
            r"test_zoo.py::test_gradient",
            r"test_losses_and_their_gradients",
            r"test_isa.py::test_(matches_the_reference|same_bits)",
            # commands on top of what the files test part by part
            r"test_mistakes_fail",
            r"test_random(_image)?_networks_match|test_random_networks_agree",
            r"test_changes_between_forward_and_backward|test_compiled_calls_match_eager_ones",
            r"test_compiled_settings|test_equal_gradients_have_memory_of_their_own",
        ]
    )
)
"""What `make test` leaves to `make test-all`, to end within six minutes on two cores."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: pytest-xdist's workers then share what is left."""
    for item in items:
        if EXHAUSTIVE.search(item.nodeid):
            item.add_marker("exhaustive")
        if THOROUGH.search(item.nodeid):
            item.add_marker("thorough")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nothing_waits() -> Iterator[None]:
    """Afterwards no task that `maml_fast.compat` has recorded waits to be run."""
    from maml_fast.compat.recorder import RECORDER

    yield
    RECORDER.settle()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the public data sets: `MAML_FAST_DATA`, or ../shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MAML_FAST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data: {folder} is not a folder (MAML_FAST_DATA names it)")
    return folder


@pytest.fixture(scope="session")
def core() -> ModuleType:
    """The compiled core; absence skips, or fails with `MAML_FAST_REQUIRE_CORE=1`."""
    try:
        return importlib.import_module("maml_fast._core")
    except ImportError as error:
        if os.environ.get("MAML_FAST_REQUIRE_CORE") == "1":
            pytest.fail(f"maml_fast._core is required and not built: {error}")
        pytest.skip(f"maml_fast._core is not built: {error}")
