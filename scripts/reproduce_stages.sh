# Sourced by the reproduce_72b scripts, which set ENGINE and `launch`: the stages of the paper, one command each.
: "${MODEL:?set MODEL to the folder of the base model}"
: "${CORPUS:?set CORPUS to the folder or file of the training text}"
: "${PROBLEMS:?set PROBLEMS to the explained problems up to 2017}"
: "${SHOTS:?set SHOTS to the file of the three example problems}"
: "${EXAM:?set EXAM to the evaluation exam (an IgakuQA checkout)}"
OUT="${OUT:-runs/reproduce-$ENGINE}"
[ -n "${PYTHON_BIN:-}" ] && PATH="$PYTHON_BIN:$PATH"

# Word splitting of the *_ARGS variables is wanted: they hold several options.
stage_cpt() {
  launch cpt_4xa100 cpt --config paper_cpt_72b --engine "$ENGINE" --model.path "$MODEL" --run "$OUT/cpt" \
    --corpus.documents "$CORPUS" --corpus.problems "$PROBLEMS" --held_out.problems "$EXAM" ${CPT_ARGS:-}
}

# A server is asked by one process, whatever launches the engine's own.
answer() {
  case " $* " in
    *" --engine openai "*) medllm "$@" ;;
    *) launch cpt_4xa100 "$@" ;;
  esac
}

stage_merge() {
  medllm convert --model "$MODEL" --adapter "$OUT/cpt/adapter" --out "$OUT/cpt/merged"
}

stage_curate() {
  answer curate --config paper_curate_72b --engine "$ENGINE" --model.path "$OUT/cpt/merged" --run "$OUT/curate" \
    --problems "$PROBLEMS" --shots "$SHOTS" --held_out.problems "$EXAM" ${CURATE_ARGS:-}
}

stage_rpo() {
  launch rpo_2xa100 rpo --config paper_rpo_72b --engine "$ENGINE" --model.path "$OUT/cpt/merged" --run "$OUT/rpo" \
    --preferences "$OUT/curate/preferences.jsonl" --held_out.problems "$EXAM" ${RPO_ARGS:-}
}

stage_evaluate() {
  local explanation
  for explanation in false true; do
    answer evaluate --config paper_evaluate_72b --engine "$ENGINE" --model.path "$OUT/cpt/merged" \
      --model.adapter "$OUT/rpo/adapter" --run "$OUT/evaluate-explanation-$explanation" \
      --problems "$EXAM" --shots "$SHOTS" --explanation "$explanation" ${EVALUATE_ARGS:-}
  done
  medllm report "$OUT/cpt" "$OUT/curate" "$OUT/rpo" "$OUT"/evaluate-* --out "$OUT/report.html"
}

run_stages() {
  local stage
  for stage in ${*:-cpt merge curate rpo evaluate}; do
    "stage_$stage"
  done
}
