# The three stages of LIONs on a small machine, then scores and win rates: bash examples/lions_smollm2.sh MODEL_DIR PAIRS
set -e; pairs=$2; out=lions_output; mkdir -p $out/base $out/online
ln -sfn "$(realpath "$1")" $out/base/epoch_0; ln -sfn round_0/epoch_0 $out/online/epoch_0
tune run prefix_dpo_single_device --config lions/smollm2_135M_sft path=$out/base/epoch_0 dataset.data_files="$pairs"
tune run prefix_dpo_single_device --config lions/smollm2_135M_dpo dataset.data_files="$pairs"
tune run prefix_dpo_online --config lions/smollm2_135M_online prompts.data_files="$pairs"
tune run prefix_dpo_harness_task --config lions/smollm2_135M_dpo dataset.data_files="$pairs"
for m in base sft dpo online; do lm_eval --model hf --model_args pretrained=$out/$m/epoch_0,dtype=float32,add_bos_token=False --tasks held_out_pairs --include_path $out/dpo/harness --output_path $out/scores/$m
  tune run prefix_dpo_sample --config lions/smollm2_135M_online path=$out/$m/epoch_0 prompts.data_files="$pairs" 'prompts.split=train[-64:]' num_answers=2 output_dir=$out/answers/$m; done
tune run prefix_dpo_judge --config lions/smollm2_135M_online prompts.data_files="$pairs" output_dir=$out/judged "answers=[$(for m in base sft dpo online; do printf %s, $out/answers/$m/round_0/answers.parquet; done)]"
