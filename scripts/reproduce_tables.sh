#!/usr/bin/env bash
# Rows of the paper's Tables 1 to 3, each with the paper's figures beside it: table1_ROW, table2_ROW, table3_ROW, as
# `medllm evaluate --help all` lists them, and the published predictions table1_gpt-4 and table1_gpt-3.5.
#
#   EXAM=igakuqa/ SHOTS=igakuqa/prompts/prompt.jsonl bash scripts/reproduce_tables.sh table1_gpt-4o table1_gpt-4
#   SETS=sets/ bash scripts/reproduce_tables.sh table3_qwen2.5-72b
#
# EXAM is an IgakuQA checkout; SETS a folder with a file or folder a set: MMMLU.csv, MedQA.jsonl, MedMCQA.jsonl, PubMedQA.jsonl.
# A row of Tables 1 and 2 is run without and with an explanation, one of Table 3 on the four sets; runs lie under OUT. Overrides
# go into EVALUATE_ARGS: EVALUATE_ARGS="--engine jax --model.path /models/Qwen2.5-72B".
set -euo pipefail
OUT="${OUT:-runs/tables}"
[ -n "${PYTHON_BIN:-}" ] && PATH="$PYTHON_BIN:$PATH"
[ $# -gt 0 ] || { echo "name rows, such as table1_gpt-4o; medllm evaluate --help all lists them" >&2; exit 2; }

# Word splitting of EVALUATE_ARGS is wanted: it holds several options.
exam_row() {
  local explanation
  for explanation in false true; do
    runs+=("$OUT/$1-explanation-$explanation")
    medllm evaluate --config "$1" --run "${runs[-1]}" --problems "${EXAM:?set EXAM to an IgakuQA checkout}" \
      --shots "${SHOTS:?set SHOTS to the file of the three example problems}" --explanation "$explanation" ${EVALUATE_ARGS:-}
  done
}

sets_row() {
  local name subjects files
  for name in MMMLU MedQA MedMCQA PubMedQA; do
    files=("${SETS:?set SETS to the folder of the zero-shot sets}/$name"*)
    subjects=()
    [ "$name" = MMMLU ] && subjects=(--subjects anatomy clinical_knowledge college_medicine medical_genetics professional_medicine)
    runs+=("$OUT/$1-$name")
    medllm evaluate --config "$1" --run "${runs[-1]}" --problems "${files[@]}" --problem_set "$name" "${subjects[@]}" \
      ${EVALUATE_ARGS:-}
  done
}

predictions_row() {
  mkdir -p "$OUT"
  runs+=("$OUT/$1.json")
  medllm score --problems "${EXAM:?set EXAM to an IgakuQA checkout}" --predictions "$EXAM/baseline_results/*/*_$2.jsonl" \
    --label "$3" --json "${runs[-1]}"
}

runs=()
for row in "$@"; do
  case "$row" in
    table1_gpt-4) predictions_row "$row" gpt4 GPT-4 ;;
    table1_gpt-3.5) predictions_row "$row" chatgpt GPT-3.5 ;;
    table3_*) sets_row "$row" ;;
    *) exam_row "$row" ;;
  esac
done
medllm report "${runs[@]}" --out "$OUT/report.html" --json "$OUT/report.json"
