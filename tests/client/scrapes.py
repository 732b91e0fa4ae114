"""Two scrapes of a server, as far as `loraplex top` and the playground read them."""

BEFORE = """
# HELP loraplex_sequences Sequences, by state.
# TYPE loraplex_sequences gauge
loraplex_sequences{replica="0",state="running"} 0.0
loraplex_generated_tokens_total{replica="0"} 100.0
loraplex_requests_total{adapter="sql",outcome="finished"} 5.0
"""
NOW = """
loraplex_build_info{model="org/model",version="1"} 1.0
loraplex_sequences{replica="0",state="running"} 3.0
loraplex_sequences{replica="0",state="waiting"} 2.0
loraplex_kv_blocks{replica="0",state="used"} 30.0
loraplex_kv_blocks{replica="0",state="cached"} 30.0
loraplex_kv_blocks{replica="0",state="free"} 60.0
loraplex_adapters{replica="0",tier="device"} 4.0
loraplex_adapters{replica="0",tier="host"} 9.0
loraplex_adapter_slots{replica="0"} 64.0
loraplex_generated_tokens_total{replica="0"} 300.0
loraplex_requests_total{adapter="sql",outcome="finished"} 9.0
loraplex_requests_total{adapter="sql",outcome="cancelled"} 2.0
loraplex_time_to_first_token_seconds_sum 0.4
loraplex_time_to_first_token_seconds_count 2.0
loraplex_step_duration_seconds_sum{replica="0"} 1.0
loraplex_step_duration_seconds_count{replica="0"} 50.0
loraplex_step_tokens_total{replica="0",phase="prefill"} 400.0
loraplex_step_tokens_total{replica="0",phase="decode"} 150.0
loraplex_adapter_sequences{adapter="sql",state="running"} 3.0
loraplex_adapter_sequences{adapter="[red]x",state="running"} 0.0
loraplex_adapter_generated_tokens_total{adapter="sql"} 80.0
loraplex_queue_wait_seconds_sum{adapter="sql"} 0.1
loraplex_queue_wait_seconds_count{adapter="sql"} 4.0
"""
