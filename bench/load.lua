-- wrk -s load.lua URL -- METHOD BODY_FILE keep|close
-- The same request again and again, as an Elasticsearch client sends it; the outcome as one line of JSON.

function init(args)
   local file = assert(io.open(args[2], "rb"))
   wrk.method = args[1]
   wrk.body = file:read("*a")
   file:close()
   wrk.headers["Authorization"] = "Basic YmVuY2g6c2VjcmV0" -- bench:secret
   wrk.headers["Content-Type"] = "application/json"
   wrk.headers["Accept"] = "application/json"
   wrk.headers["User-Agent"] = "elasticsearch-py/8.15.0 (Python/3.12.3; elastic-transport/8.15.0)"
   if args[3] == "close" then
      wrk.headers["Connection"] = "close"
   end
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      'JSON {"requests":%d,"seconds":%.6f,"bytes":%d,"p50_us":%d,"p90_us":%d,"p99_us":%d,"max_us":%d,' ..
      '"errors":{"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d}}\n',
      summary.requests, summary.duration / 1e6, summary.bytes, latency:percentile(50), latency:percentile(90),
      latency:percentile(99), latency.max, errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
