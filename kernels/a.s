	.section	.text.mhc_pre_fwd_one_pass_w384_bf16,"ax",@progbits
