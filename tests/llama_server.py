"""llama.cpp's server on a file, at full precision: `python llama_server.py FILE CONTEXT` prints its address.

In a process of its own, which is killed: the server's own end waits for a thread for ever now and then.
"""

import sys

import xllamacpp


def main(file: str, context: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, context, 1
    params.warmup, params.cpuparams.n_threads, params.verbosity = False, 1, 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
