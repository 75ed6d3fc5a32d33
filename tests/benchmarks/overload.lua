-- Requests that do not wait for one another, for wrk: each of many connections rests between its
-- own, for a random time. A request is named by the time at which it was made, which comes back in
-- its answer. What was found is one line of JSON.
local ffi = require("ffi")
ffi.cdef("typedef struct { long s; long us; } stamp; int gettimeofday(stamp *, void *);")
local stamp = ffi.new("stamp")
local function now()
  ffi.C.gettimeofday(stamp, nil)
  return tonumber(stamp.s) * 1e6 + tonumber(stamp.us)
end
local file = io.open(os.getenv("BODY"), "rb")
local body = file:read("*a")
file:close()
local rest_ms = tonumber(os.getenv("REST_MS"))
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init() taken, refused, other = "", 0, 0 end
function delay() return math.random(0, rest_ms) end
function request()
  local headers = {["Content-Type"] = "application/json"}
  headers["X-Request-ID"] = string.format("%.0f", now())
  return wrk.format("POST", nil, headers, body)
end
function response(status, headers)
  if status == 200 then
    local made = headers["X-Request-ID"] or headers["x-request-id"]
    taken = taken .. string.format("%.0f,", now() - tonumber(made))
  elseif status == 503 then refused = refused + 1
  else other = other + 1 end
end
function done(summary)
  local thread, e = threads[1], summary.errors
  print(string.format('{"taken":[%s0],"refused":%d,"other":%d,"us":%d}', thread:get("taken"),
    thread:get("refused"), thread:get("other") + e.connect + e.read + e.write + e.timeout,
    summary.duration))
end
