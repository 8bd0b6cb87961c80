#!/bin/sh
# Scores a run's adapter and its base, at equal positions, on RULER's retrieval (passkey, key-value, variable tracking) up to the run's
# length and on LongBench's code completion and retrieval, by lm-evaluation-harness.
# Needs a network (data sets, and for RULER nltk's tables): pip install "lm_eval[hf,ruler,longbench]"
# Memory and time: those of inference at TOKENS; an 8B model at 32K in bfloat16 wants about 24 GB, RULER's 500 questions a task and length hours.
# Command: sh recipes/lm_eval_long_context.sh outputs/r03 meta-llama/Llama-3.1-8B 32768
# Where the run extended the context, give the positions it trained under as a fourth argument, as its card names them:
#   '"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}'
# LIMIT=20 asks 20 questions a task, to try it out.
set -eu
run=$1 base=$2 tokens=$3 positions=${4:-}
shared="\"pretrained\": \"$base\", \"dtype\": \"bfloat16\", \"max_length\": $tokens${positions:+, \"max_position_embeddings\": $tokens, $positions}"
lengths=4096
for length in 8192 16384 32768 65536 131072; do
    if [ "$length" -le "$tokens" ]; then lengths="$lengths,$length"; fi
done
adapter=$run-adapter
[ -d "$adapter" ] || lemo export "$run" --to adapter --output "$adapter"

score() { # name, further model arguments
    # Base models complete text, so no chat template; LongBench cuts from the left what is longer than max_length.
    lm_eval --model hf --model_args "{$shared$2}" --batch_size 1 ${LIMIT:+--limit "$LIMIT"} \
        --tasks niah_single_1,niah_multikey_2,ruler_vt --metadata "{\"max_seq_lengths\": [$lengths]}" --output_path "$run-lm_eval/$1-ruler"
    lm_eval --model hf --model_args "{$shared$2}" --batch_size 1 ${LIMIT:+--limit "$LIMIT"} \
        --tasks longbench_lcc,longbench_repobench-p,longbench_passage_retrieval_en --output_path "$run-lm_eval/$1-longbench"
}
score base ""
score adapter ", \"peft\": \"$adapter\""
