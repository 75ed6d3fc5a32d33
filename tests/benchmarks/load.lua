-- The same request over and over, for wrk; what was found as one line of JSON.
local file = io.open(os.getenv("BODY"), "rb")
wrk.method, wrk.body = "POST", file:read("*a")
file:close()
wrk.headers["Content-Type"], wrk.headers["Accept"] = os.getenv("GIVEN"), os.getenv("WANTED")
function done(summary, latency)
  local e = summary.errors
  print(string.format('{"n":%d,"us":%d,"p50":%f,"p99":%f,"status":%d,"lost":%d,"bytes":%d}',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), e.status,
    e.connect + e.read + e.write + e.timeout, summary.bytes))
end
