"""`funnel bench serve`: latencies of requests that arrive at random times, whatever the engine is doing by then.

`suite` embeds in this process; `http_suite` asks servers over sockets.
"""
