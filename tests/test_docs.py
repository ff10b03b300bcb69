"""README and docs stay true: links and anchors lead somewhere, files exist, commands parse, and are run or say why not."""

import re
import shlex

import pytest

from medllm.cli import COMMANDS
from medllm.command import Group
from medllm.command_words import check_options, find_command
from tests.pages import PAGES, README, ROOT, anchors, commands, inline_commands, prose, read

PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

RUN = {
    r"bash scripts/quickstart\.sh": "test_mini_study.py",
    r"bash scripts/reproduce_72b_a100\.sh": "test_reproduce_scripts.py",
    r"medllm ablate .*--(preset|config|seeds)": "test_ablate_command.py",
    r"bash scripts/gpu_bench\.sh": "test_gpu_bench_runs.py",
    r"medllm bench (cpt|floor)": "test_where_time_goes.py",
    r"medllm bench load": "test_streaming.py",
    r"medllm (data leaks|score) .*leaks\.json": "test_report_clean.py",
    r"medllm cpt --mesh data=2": "test_sharded_engine.py",
    r"medllm cpt --mesh fsdp=4,tensor=2": "test_processes.py",
    r"medllm cpt .*--print_config": "test_cli.py",
    r"medllm cpt .*--tracker": "test_trackers.py",
    r"medllm evaluate --engine openai .*--dry_run": "test_server_faults.py",
    r"medllm evaluate --engine openai .*--method options": "test_served_options.py",
    r"medllm evaluate --engine openai .*--server\.fields": "test_llama_cpp.py",
    r"medllm cpt .*world/corpus\.jsonl": "test_mini_study.py",
    r"medllm data export-trl": "test_docs_data.py",
    r"medllm mini --(out|engine)": "test_isolation.py",
    r"medllm parity .*--model\.path": "test_audit.py",
    r"medllm verify-mesh": "test_verify_mesh.py",
    r"medllm replay": "test_replay_command.py",
    r"medllm plan .*--calibrat": "test_plan_calibration.py",
    r"medllm plan .*--(target|search)": "test_plan_command.py",
    r"medllm (cpt|rpo|convert) .*--(handover|held_text|model\.adapter)": "test_handover.py",
    r"medllm power": "test_report_power.py",
    r"medllm publish": "test_publish.py",
    r"medllm verify": "test_verify.py",
    r"medllm check-serving": "test_check_serving.py",
    r"medllm rpo --preferences": "test_reproduce_scripts.py",
    r"medllm rpo --loss\.name": "test_jax_losses.py",
    r"medllm rounds": "test_rounds.py",
    r"medllm score .*--predictions": "test_readme.py",
    r"medllm data read": "test_exam_texts.py",
    r"medllm data problems": "test_exam_layouts.py",
    r"medllm data task": "test_harness_tasks.py",
    r"medllm evaluate .*--method (options|letters)": "test_stages.py",
    r"medllm evaluate --config table": "test_reproduce_tables.py",
    r"medllm evaluate --help all": "test_command_help.py",
    r"medllm report .*--json": "test_report_sets.py",
    r"medllm report .*--format": "test_report_formats.py",
    r"bash scripts/reproduce_tables\.sh": "test_reproduce_tables.py",
    r"python -m medllm\.harness": "test_harness.py",
    r"python scripts/api_page\.py": "test_api.py",
    r"python -m tests\.fuzz": "test_fuzz.py",
    r"python scripts/mutate\.py --only": "test_mutations.py",
}
"""Commands of the pages that a test runs: with the page's own words, or on a smaller model and other folders."""

NOT_RUN = {
    r"python -m tests\.killed_training": "it kills a training twenty times; test_killed_training.py kills it twice",
    r"python -m tests\.damaged_checkpoints": "it damages hundreds of checkpoints; both engines' tests damage some",
    r"bash scripts/test\.sh": "it is what runs the tests",
    r"python scripts/leak_recall\.py": "it takes minutes; test_leaks_near.py plants some of the same copies",
    r"bash scripts/release\.sh": "it asks PyPI; test_isolation.py builds the wheel",
    r"python -m pytest": "it is a test",
    r"python -m parity_tests\.loss_differences": "it draws 20 inputs a loss; test_loss_formulas.py draws fifteen",
    r"python -m tests\.(killed_runs|journal_load|mesh_faults)": "it takes minutes; a test does less of the same",
    r"python scripts/calibrate_statistics\.py": "it takes minutes; test_report_nested.py draws some of the same exams",
    r"python -m tests\.large_study": "it opens a page of 2,000 questions ten times; test_report_browser.py opens it twice",
    r"python -m tests\.killed_writers": "it kills forty times; test_killed_writers.py kills twice",
    r"python scripts/checkpoint_time\.py": "it measures, on an idle machine, for minutes",
    r"python scripts/fuzz_by_coverage\.py": "it needs atheris, and takes an hour; test_fuzz.py reads the same formats",
    r"python -m tests\.killed_study": "it takes minutes; test_mini_study.py ends a study once",
    r"python scripts/mutate\.py --jobs": "it plants all faults, which takes hours; test_mutations.py plants one",
    r"medllm .*\$(D|OUT)/": "it needs real exams and documents, which are not part of the project",
}
"""Commands that no test runs, and why."""


def test_the_index_names_every_page():
    index = read(ROOT / "docs" / "README.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


@PAGE
def test_every_link_and_every_anchor_exists(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@PAGE
def test_every_file_a_page_names_exists(page):
    if page.name == "CHANGELOG.md":  # it tells of files that are gone
        return
    packages = "medllm|jax_medllm|torch_ref|medllm_parity|parity_tests|tests|scripts|docs"
    for named in re.findall(rf"(?<![\w/.-])((?:{packages})/[\w./*-]*\w)", read(page)):
        assert list(ROOT.glob(named)), named


@PAGE
def test_every_command_parses(page):
    for command in {*commands(page), *inline_commands(page)}:
        words = shlex.split(command)
        if words[0] != "medllm" or words[1].startswith("-"):
            continue
        if isinstance(COMMANDS.get(words[1]), Group) and (len(words) == 2 or "|" in words[2]):
            continue
        name, found, rest = find_command(words[1:], COMMANDS)
        check_options(name, [word for word in rest if word not in ("--help", "--debug")], found.parser())


@PAGE
def test_every_command_is_run_by_a_test_or_says_why_not(page):
    for command in commands(page):
        assert any(re.match(one, command) for one in [*RUN, *NOT_RUN]), f"{command}: add it to RUN or NOT_RUN"


def test_the_lists_of_commands_hold_nothing_else():
    found = [command for page in PAGES for command in commands(page)]
    for pattern in [*RUN, *NOT_RUN]:
        assert any(re.match(pattern, command) for command in found), pattern
    for file in RUN.values():
        assert [*(ROOT / "tests").rglob(file), *(ROOT / "parity_tests").rglob(file)], file


def test_the_readme_names_every_command():
    listed = re.search(r"`medllm ([a-z |-]+)`", read(README))
    assert listed is not None
    assert set(listed[1].split(" | ")) == set(COMMANDS)
