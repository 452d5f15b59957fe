#!lua name=inferpipe_cron_v1
-- Clocks: when a workflow is due next. The keys stand at the top of redis_functions.lua; all are in
-- the slot of the configuration, so that storing a definition sets its clock in the same call.
--
-- One worker at a time keeps time: it has the lease. What it starts has ids derived from the due
-- time, so one that lost its lease without knowing starts nothing twice; and what it then writes
-- down is refused. Times are the server's own, so workers need not agree on the hour.

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n)
  return string.format('%.0f', n)
end

-- clock: worker lease_ms limit -> {now, 1 when the worker keeps time, next look or -1, {name, from...}}
-- with those that are due: from is "<after_ms> <version>", the moment up to which all is dealt with.
local function clock(keys, args)
  local p, now = keys[1], now_ms()
  local owner = redis.call('GET', p .. ':cron:owner')
  if owner and owner ~= args[1] then return {text(now), 0, '-1', {}} end
  redis.call('SET', p .. ':cron:owner', args[1], 'PX', args[2])
  local due = {}
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', p .. ':cron', '-inf', text(now), 'LIMIT', 0, args[3])) do
    local from = redis.call('HGET', p .. ':cron:from', name)
    if from then
      due[#due + 1], due[#due + 2] = name, from
    else
      redis.call('ZREM', p .. ':cron', name)
    end
  end
  local first = redis.call('ZRANGE', p .. ':cron', 0, 0, 'WITHSCORES')
  return {text(now), 1, first[2] or '-1', due}
end

-- clock_set: worker name from new_from next_ms -> 1 when it was written down; next_ms '': never again
local function clock_set(keys, args)
  local p, name = keys[1], args[2]
  if redis.call('GET', p .. ':cron:owner') ~= args[1] then return 0 end
  if redis.call('HGET', p .. ':cron:from', name) ~= args[3] then return 0 end
  redis.call('HSET', p .. ':cron:from', name, args[4])
  if args[5] == '' then
    redis.call('ZREM', p .. ':cron', name)
  else
    redis.call('ZADD', p .. ':cron', args[5], name)
  end
  return 1
end

-- clock_release: worker: it stops keeping time
local function clock_release(keys, args)
  if redis.call('GET', keys[1] .. ':cron:owner') ~= args[1] then return 0 end
  return redis.call('DEL', keys[1] .. ':cron:owner')
end

redis.register_function('ip1_clock', clock)
redis.register_function('ip1_clock_set', clock_set)
redis.register_function('ip1_clock_release', clock_release)
